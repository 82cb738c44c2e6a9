//! What `exec --trace-syscalls` prints: the calls outside the policy, and what would allow each.

use serde::Serialize;

use crate::job::Reply;
use crate::sandbox::Trace;
use crate::sandbox::inner_wall::Remedy;

/// One call, as it was made.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    syscall: String,
    /// Those that decided, where some are allowed.
    arguments: String,
    /// What the policy does with it: `kill`, `refuse` or `quiet`.
    class: &'static str,
    errno: Option<String>,
    count: u64,
    /// A line of the configuration.
    allow: Option<String>,
    /// Why there is no such line, or what else it takes.
    note: Option<String>,
}

/// The form with `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Document<'a> {
    result: &'a Reply,
    outside_policy: &'a [Row],
}

impl<'a> Document<'a> {
    pub(super) fn new(result: &'a Reply, rows: &'a [Row]) -> Self {
        Self { result, outside_policy: rows }
    }
}

/// What has been seen, for jobs of `environment`: first what ends a job, last what libraries never notice.
pub(super) fn rows(trace: &Trace, environment: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = trace
        .seen()
        .into_iter()
        .map(|(denied, count)| {
            let (allow, note) = match denied.remedy {
                Remedy::Name => (Some(format!("sandbox.allow_syscalls = [\"{}\"]", denied.syscall)), None),
                Remedy::Exec => (
                    Some(format!("environments.{environment}.allow_exec = true")),
                    Some("or a list of programs".to_owned()),
                ),
                Remedy::Network => (
                    Some("sandbox.allow_network = true".to_owned()),
                    Some("and the job asks for it: enable_network".to_owned()),
                ),
                Remedy::Nothing(why) => (None, Some(why.into_owned())),
            };
            let syscall = denied.syscall.into_owned();
            Row {
                syscall,
                arguments: denied.arguments,
                class: denied.class,
                errno: denied.errno,
                count,
                allow,
                note,
            }
        })
        .collect();
    rows.sort_by_key(|row| ["kill", "refuse", "quiet"].iter().position(|class| *class == row.class));
    rows
}

/// The same for a person.
pub(super) fn page(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "sandpiper: every system call was within the policy\n".to_owned();
    }
    let cells = |row: &Row| {
        let call = format!("{} {}", row.syscall, row.arguments);
        let verdict = format!("{} {}", row.class, row.errno.as_deref().unwrap_or_default());
        let remedy = match (&row.allow, &row.note) {
            (Some(line), Some(note)) => format!("{line}  # {note}"),
            (Some(line), None) => line.clone(),
            (None, note) => format!("# {}", note.as_deref().unwrap_or("nothing allows it")),
        };
        [call.trim_end().to_owned(), verdict.trim_end().to_owned(), row.count.to_string(), remedy]
    };
    let head = ["system call", "the policy", "count", "to allow it"].map(str::to_owned);
    let table: Vec<[String; 4]> = std::iter::once(head).chain(rows.iter().map(cells)).collect();
    let width = |at: usize| table.iter().map(|row| row[at].len()).max().unwrap_or(0);
    let [call, verdict, count] = [0, 1, 2].map(width);
    let mut page = format!("sandpiper: {} kinds of system calls were outside the policy\n", rows.len());
    for [a, b, c, d] in &table {
        page.push_str(&format!("  {a:<call$}  {b:<verdict$}  {c:>count$}  {d}\n"));
    }
    let mut names: Vec<&str> = rows
        .iter()
        .filter(|row| row.allow.as_ref().is_some_and(|line| line.contains("allow_syscalls")))
        .map(|row| row.syscall.as_str())
        .collect();
    names.dedup();
    if names.len() > 1 {
        page.push_str(&format!("  all that have a name: sandbox.allow_syscalls = {names:?}\n"));
    }
    page.push_str("  What is refused or quiet often need not be allowed: libraries do without. `sandpiper policy` has the reasons.\n");
    page
}
