//! Code becomes a payload: template, XOR with a fresh 512-bit key, base64. Pure.
//!
//! The code goes into the rendered prescript and the key stays outside of it, in the assignment: a process gets
//! the one when it starts and the other when it has locked itself down.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::RngExt;

use crate::job::{InputFile, Job};

/// What runs in every python process.
const TEMPLATE: &str = include_str!("../../prescript.py");

/// The lines in it around what only a zygote needs.
const ZYGOTE: [&str; 2] = ["    # Only a zygote is given what follows", "    # So far.\n"];

/// What runs in a cold one: without that part, which python would have to read for every job.
static COLD: LazyLock<String> = LazyLock::new(|| {
    let [begin, end] = ZYGOTE.map(|line| TEMPLATE.find(line).unwrap_or_default());
    [&TEMPLATE[..begin], &TEMPLATE[end..]].concat()
});

/// Where that becomes a single statement, with every placeholder in it.
const STATEMENT: &str = "# In a namespace of its own";

/// The prescript for cold processes of one interpreter.
#[derive(Debug)]
pub struct Prescript {
    /// All of it but the last statement.
    head: String,
}

impl Prescript {
    /// What an interpreter runs to compile the prescript for others of its kind, which would take them as long as
    /// a quarter of their start. It reads [`source`](Self::source) and prints one line.
    pub const COMPILER: &str = "\
import marshal, sys
code = compile(sys.stdin.read(), '<stdin>', 'exec')
print(sys.hexversion, marshal.dumps(code).hex())
";

    /// What there is to compile.
    pub fn source() -> &'static str {
        COLD.split_once(STATEMENT).unwrap_or_default().0
    }

    /// As it stands: python compiles it itself.
    pub fn plain() -> Self {
        Self { head: Self::source().to_owned() }
    }

    /// From the [`COMPILER`](Self::COMPILER)'s line. None where that is something else.
    pub fn compiled(line: &str) -> Option<Self> {
        let (version, code) = line.trim_end().split_once(' ')?;
        let is_hex = |digit: u8| digit.is_ascii_hexdigit();
        if !version.bytes().all(|digit| digit.is_ascii_digit()) || !code.bytes().all(is_hex) {
            return None;
        }
        // The interpreter may be replaced by a newer one while the worker runs.
        let source: String = Self::source().bytes().map(|byte| format!("{byte:02x}")).collect();
        let head = format!(
            "import marshal, sys\nif sys.hexversion == {version}:\n    exec(marshal.loads(bytes.fromhex('{code}')))\n\
             else:\n    exec(compile(bytes.fromhex('{source}'), '<stdin>', 'exec'))\n"
        );
        Some(Self { head })
    }
}

/// Bytes of a key: 512 bits.
const KEY_BYTES: usize = 64;

/// A job in the form in which it enters a process.
#[derive(Debug)]
pub struct Payload {
    /// The job's id, for the log.
    pub id: String,
    /// The environment that it runs in.
    pub environment: String,
    /// The host's network.
    pub network: bool,
    /// There is code to run before the filter.
    pub has_preload: bool,
    /// Standard input.
    pub stdin: Vec<u8>,
    /// Laid into the working directory.
    pub files: Vec<InputFile>,
    /// Glob patterns of files to return.
    pub artifacts: Vec<String>,
    key: String,
    arguments: Vec<String>,
    variables: BTreeMap<String, String>,
    code: String,
    preload: String,
}

impl Payload {
    /// Encodes the code of `job` with a fresh random key.
    pub fn encode(job: Job) -> Self {
        let key: [u8; KEY_BYTES] = rand::rng().random();
        Self {
            id: job.id,
            environment: job.environment,
            network: job.enable_network,
            has_preload: !job.preload.is_empty(),
            stdin: job.stdin,
            files: job.files,
            artifacts: job.artifacts,
            key: BASE64.encode(key),
            arguments: job.args,
            variables: job.env,
            code: BASE64.encode(xor(job.code.into_bytes(), &key)),
            preload: BASE64.encode(job.preload),
        }
    }

    /// What goes over the control socket once the filter is on: key, code, number of arguments, arguments,
    /// variables; each ends in NUL. The code is there `with_code`, for a process whose prescript was rendered
    /// before the job came. `operators` are variables that the job's own override.
    pub fn assignment(&self, with_code: bool, operators: &[(&str, &str)]) -> Vec<u8> {
        let mut fields = Vec::with_capacity(self.key.len() + self.code.len() + 1024);
        let mut put = |parts: &[&str]| {
            parts.iter().for_each(|part| fields.extend_from_slice(part.as_bytes()));
            fields.push(0);
        };
        put(&[&self.key]);
        put(&[if with_code { &self.code } else { "" }]);
        put(&[&self.arguments.len().to_string()]);
        self.arguments.iter().for_each(|argument| put(&[argument]));
        operators.iter().for_each(|(name, value)| put(&[name, "=", value]));
        self.variables.iter().for_each(|(name, value)| put(&[name, "=", value]));
        fields
    }

    /// The `prescript` for a process that is to be this user and group.
    pub fn render(&self, prescript: &Prescript, uid: u32, gid: u32) -> String {
        let statement = &COLD[Prescript::source().len()..];
        [&prescript.head, &*render(statement, [uid, gid], self.network, &self.preload, &self.code)].concat()
    }
}

/// The prescript for a zygote, which has uid 0 in its own namespace and no code: it does these imports.
pub fn render_zygote(imports: &[String]) -> String {
    let imports: String = imports.iter().map(|module| format!("import {module}\n")).collect();
    render(TEMPLATE, [0, 0], false, &BASE64.encode(imports), "")
}

fn render(template: &str, [uid, gid]: [u32; 2], network: bool, preload: &str, code: &str) -> String {
    let (uid, gid) = (uid.to_string(), gid.to_string());
    let network = if network { "1" } else { "0" };
    fill(template, |name| match name {
        "uid" => Some(&uid),
        "gid" => Some(&gid),
        "enable_network" => Some(network),
        "preload" => Some(preload),
        "code" => Some(code),
        _ => None,
    })
}

/// Encodes and decodes: the key is repeated over the code.
fn xor(mut code: Vec<u8>, key: &[u8; KEY_BYTES]) -> Vec<u8> {
    for (byte, key) in code.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
    code
}

/// Replaces each `{{name}}` that has a value, in one pass: what a value holds is never looked at again.
fn fill<'a>(template: &'a str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        filled.push_str(before);
        let placeholder = after.split_once("}}").and_then(|(name, after)| Some((value(name)?, after)));
        match placeholder {
            Some((value, after)) => {
                filled.push_str(value);
                rest = after;
            }
            None => {
                filled.push_str("{{");
                rest = after;
            }
        }
    }
    filled.push_str(rest);
    filled
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_cold_process_is_given_all_but_the_zygote() {
        let [begin, end] = ZYGOTE.map(|line| TEMPLATE.find(line).unwrap_or_default());
        assert!(begin > 0 && end > begin + (4 << 10), "{begin} to {end}");
        assert!(TEMPLATE.contains("def zygote(") && !COLD.contains("def zygote("));
        let statement = &COLD[Prescript::source().len()..];
        for name in ["uid", "gid", "enable_network", "preload", "code"] {
            assert_eq!(statement.matches(&format!("{{{{{name}}}}}")).count(), 1, "{name}");
        }
        assert!(!Prescript::source().contains("{{") && Prescript::source().contains("def sandpiper("));
    }

    #[test]
    fn only_a_compilers_line_is_taken() {
        let compiled = Prescript::compiled("50991856 e300ff\n").unwrap();
        assert!(compiled.head.contains("== 50991856:") && compiled.head.contains("fromhex('e300ff')"));
        for line in ["", "50991856", "50991856 e3'", "x e3", "Traceback (most recent call last):"] {
            assert!(Prescript::compiled(line).is_none(), "{line}");
        }
    }

    #[test]
    fn every_placeholder_of_the_template_is_filled() {
        for name in ["uid", "gid", "enable_network", "preload", "code"] {
            assert_eq!(TEMPLATE.matches(&format!("{{{{{name}}}}}")).count(), 1, "{name}");
        }
        let filled = fill(TEMPLATE, |_| Some("0"));
        assert!(!filled.contains("{{"), "{filled}");
    }

    #[test]
    fn a_placeholder_inside_a_value_stays_text() {
        let value = |name: &str| match name {
            "a" => Some("{{b}}"),
            "b" => Some("never"),
            _ => None,
        };
        assert_eq!(fill("<{{a}}>{{c}}{{", value), "<{{b}}>{{c}}{{");
    }

    #[test]
    fn an_assignment_holds_every_field_and_the_jobs_own_variable_last() {
        let payload = Payload {
            id: String::new(),
            environment: String::new(),
            network: false,
            has_preload: false,
            stdin: Vec::new(),
            files: Vec::new(),
            artifacts: Vec::new(),
            key: "a2V5".into(),
            arguments: vec!["one".into(), String::new()],
            variables: BTreeMap::from([("A".into(), "job=1".into())]),
            code: String::new(),
            preload: String::new(),
        };
        let assignment = payload.assignment(false, &[("A", "operator")]);
        assert_eq!(assignment, b"a2V5\0\x002\0one\0\0A=operator\0A=job=1\0");
    }

    #[test]
    fn decoding_is_encoding_again() {
        let key = [0xa5; KEY_BYTES];
        let code: Vec<u8> = (0..1000_u32).map(|byte| (byte % 251) as u8).collect();
        let encoded = xor(code.clone(), &key);
        assert_ne!(encoded, code);
        assert_eq!(xor(encoded, &key), code);
    }
}
