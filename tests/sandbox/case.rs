//! A fixture line: a program, how it is run, and what must be true of its result. tests/README.md has the format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// The next three are for readers: what kind of case, why it is here, and what is right, in words.
    #[serde(default, rename = "category")]
    _category: String,
    #[serde(default, rename = "why")]
    _why: String,
    #[serde(default, rename = "expect")]
    _expect: String,
    code: String,
    /// A file beside the fixtures, without its ending, that is put before the code.
    #[serde(default)]
    uses: Option<String>,
    /// The only machine that it makes sense on.
    #[serde(default)]
    pub(crate) arch: Option<String>,
    /// Further fields of the job.
    #[serde(default)]
    pub(crate) job: Map<String, Value>,
    /// Keys of the worker's configuration, as `--set` takes them.
    #[serde(default)]
    pub(crate) set: Vec<String>,
    /// What a warm interpreter has imported; only for libraries.
    #[serde(default)]
    pub(crate) imports: Vec<String>,
    /// The job is told the address of an HTTP server, in `URL`; only for libraries.
    #[serde(default)]
    pub(crate) server: bool,
    /// Standard input of so many bytes.
    #[serde(default)]
    stdin_bytes: usize,
    /// Runs, each of which must be right.
    #[serde(default = "once")]
    pub(crate) repeat: usize,
    /// Another case of the same file that is run right before.
    #[serde(default)]
    after: Option<String>,
    /// A program that runs at the same time, with the same fields of the job, and must succeed.
    #[serde(default, deserialize_with = "companion")]
    pub(crate) beside: Option<Box<Case>>,
    /// Something that the worker does not have yet; the case is listed as ignored.
    #[serde(default)]
    pub(crate) requires: Option<String>,
    /// A layer, as doctor names it, without which this case cannot be right; it is skipped where that is not there.
    #[serde(default)]
    pub(crate) needs: Option<String>,
    #[serde(default)]
    pub(crate) assert: Assert,
}

/// What must be true; every field that is given must hold.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Assert {
    /// Alternatives: one of them must hold, besides the fields around it.
    #[serde(default)]
    pub(crate) any: Vec<Assert>,
    pub(crate) status: Option<OneOrMany>,
    #[serde(default, deserialize_with = "given")]
    pub(crate) exit_code: Option<Value>,
    #[serde(default, deserialize_with = "given")]
    pub(crate) signal: Option<Value>,
    #[serde(default, deserialize_with = "given")]
    pub(crate) syscall: Option<Value>,
    pub(crate) error_contains: Option<String>,
    pub(crate) stdout: Option<String>,
    /// For output that is not UTF-8: its base64, as in the result.
    pub(crate) stdout_base64: Option<String>,
    pub(crate) stdout_contains: Option<OneOrMany>,
    pub(crate) stdout_not_contains: Option<OneOrMany>,
    pub(crate) stdout_len: Option<usize>,
    pub(crate) stderr_len: Option<usize>,
    pub(crate) stdout_encoding: Option<String>,
    pub(crate) stderr_encoding: Option<String>,
    /// Calls that were refused and counted.
    pub(crate) blocked: Option<OneOrMany>,
    /// These and no others were.
    pub(crate) blocked_exactly: Option<Vec<String>>,
    pub(crate) stdout_truncated: Option<bool>,
    pub(crate) stderr: Option<String>,
    pub(crate) stderr_contains: Option<OneOrMany>,
    pub(crate) stderr_len_max: Option<usize>,
    pub(crate) stderr_truncated: Option<bool>,
    pub(crate) artifacts_not_contain: Option<String>,
    /// Exactly these files come back, in this order, with this text.
    pub(crate) artifacts: Option<Vec<(String, String)>>,
    /// So many files come back.
    pub(crate) artifacts_count: Option<usize>,
    /// Exactly these pictures come back, whole, each with its width and height.
    pub(crate) artifacts_png: Option<Vec<(String, u32, u32)>>,
    pub(crate) wall_ms_min: Option<u64>,
    pub(crate) wall_ms_max: Option<u64>,
    /// So many first words of the output differ from run to run, each of them.
    pub(crate) words_differ: Option<usize>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub(crate) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

fn once() -> usize {
    1
}

/// `null` is something to assert, so it must not read as "not given".
fn given<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

fn companion<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Box<Case>>, D::Error> {
    let code = String::deserialize(from)?;
    let case = json!({"name": "companion", "code": code, "assert": {"status": "succeeded"}});
    serde_json::from_value(case).map(Some).map_err(serde::de::Error::custom)
}

impl Case {
    /// The job as it is handed to the worker.
    pub(crate) fn job(&self) -> Value {
        let mut job = self.job.clone();
        job.insert("id".into(), json!(self.name));
        job.insert("code".into(), json!(self.code));
        if self.stdin_bytes > 0 {
            job.insert("stdin".into(), json!("x".repeat(self.stdin_bytes)));
        }
        if slowness() > 1 {
            job.insert("timeout_ms".into(), json!(self.timeout_ms()));
            let limits = job.entry("limits").or_insert_with(|| json!({}));
            let cpu_ms = limits["cpu_ms"].as_u64().unwrap_or(10_000);
            limits["cpu_ms"] = json!(stretched(cpu_ms, 600_000));
        }
        Value::Object(job)
    }

    /// The wall time the job is given. One that ends by itself has all there is on a slow machine, which may be busy
    /// with others as well.
    pub(crate) fn timeout_ms(&self) -> u64 {
        let own = self.job.get("timeout_ms").and_then(Value::as_u64).unwrap_or(5_000);
        if slowness() > 1 && self.assert.rules_out("timeout") {
            MOST_MS.max(own)
        } else {
            stretched(own, MOST_MS)
        }
    }
}

impl Assert {
    /// No result with this status can be right.
    fn rules_out(&self, status: &str) -> bool {
        let other = |statuses: &OneOrMany| statuses.as_slice().iter().all(|each| each != status);
        self.status.as_ref().is_some_and(other)
            || (!self.any.is_empty() && self.any.iter().all(|each| each.rules_out(status)))
    }
}

/// The longest time that a worker allows by default.
const MOST_MS: u64 = 300_000;

/// How many times longer than on a real machine everything may take: `SP_TEST_SLOW`, for emulated ones.
pub(crate) fn slowness() -> u64 {
    let told = std::env::var("SP_TEST_SLOW").ok();
    told.map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("SP_TEST_SLOW={text} is no number")))
}

/// A limit of a job as it is on this machine. `most` is what the worker allows by default.
fn stretched(milliseconds: u64, most: u64) -> u64 {
    milliseconds.max((milliseconds * slowness()).min(most))
}

/// All fixtures, by the first word of their tests' names.
pub(crate) struct Fixtures(BTreeMap<&'static str, Vec<Case>>);

impl Fixtures {
    pub(crate) fn load() -> Self {
        let folder = std::env::var_os("SP_TEST_FIXTURES")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
        let hostile = folder.join("hostile");
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(&hostile).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|ending| ending == "jsonl"));
        files.sort();
        let hostile_cases = files.iter().flat_map(|path| cases(path)).collect();
        Self(BTreeMap::from([
            ("behaviour", cases(&folder.join("behaviour.jsonl"))),
            ("files", cases(&folder.join("files.jsonl"))),
            ("hostile", hostile_cases),
            ("libraries", cases(&folder.join("libraries.jsonl"))),
            ("program", cases(&folder.join("program.jsonl"))),
            ("twin", cases(&folder.join("twin.jsonl"))),
        ]))
    }

    /// Every case with its full name.
    pub(crate) fn cases(&self) -> impl Iterator<Item = (String, &Case)> {
        self.0.iter().flat_map(|(file, cases)| cases.iter().map(move |c| (format!("{file}::{}", c.name), c)))
    }

    /// The case that is run right before `case`.
    pub(crate) fn before(&self, case: &Case) -> Option<&Case> {
        let name = case.after.as_ref()?;
        let found = self.0.values().flatten().find(|c| c.name == *name);
        Some(found.unwrap_or_else(|| panic!("{}: no case {name} to run after", case.name)))
    }
}

/// The cases of one file, with what they use put before them.
fn cases(path: &Path) -> Vec<Case> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let parse = |(at, line): (usize, &str)| {
        let mut case: Case = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{}:{}: {error}", path.display(), at + 1));
        if let Some(name) = &case.uses {
            case.code = format!("{}{}", read(&path.with_file_name(name).with_extension("py")), case.code);
        }
        if let Some(beside) = &mut case.beside {
            (beside.job, beside.set) = (case.job.clone(), case.set.clone());
        }
        case
    };
    let cases: Vec<Case> = read(path).lines().enumerate().map(parse).collect();
    assert!(!cases.is_empty(), "{} is empty", path.display());
    cases
}
