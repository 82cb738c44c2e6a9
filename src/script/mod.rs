//! Code becomes a payload: template, XOR with a fresh 512-bit key, base64. Pure.
//!
//! [`template`]: the sections of `prescript.py` and its five placeholders.
//!
//! The code goes into the rendered prescript and the key stays outside of it, in the assignment: a process gets
//! the one when it starts and the other when it has locked itself down.

mod template;

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::RngExt;

use crate::job::{InputFile, Job};
use template::{TEMPLATE, Template, Values};

pub use template::TemplateError;

/// The prescript for cold processes of one interpreter.
#[derive(Debug)]
pub struct Prescript {
    template: Template,
    /// An expression of python's: the code object of the template's head.
    head: String,
}

impl Prescript {
    /// What an interpreter runs to compile the prescript for others of its kind, which would take them as long as
    /// a quarter of their start. It reads [`source`](Self::source) and prints one line.
    pub const COMPILER: &str = "\
import marshal, sys
code = compile(sys.stdin.read(), '<sandpiper>', 'exec')
print(sys.hexversion, marshal.dumps(code).hex())
";

    /// As it stands: python compiles it itself.
    ///
    /// # Errors
    /// The template lacks a section.
    pub fn plain() -> Result<Self, TemplateError> {
        let template = Template::cut(TEMPLATE, &[])?;
        let head = template.head_expression();
        Ok(Self { template, head })
    }

    /// What there is to compile.
    pub fn source(&self) -> &str {
        &self.template.head
    }

    /// Takes the [`COMPILER`](Self::COMPILER)'s line. False if that is something else.
    pub fn take_compiled(&mut self, line: &str) -> bool {
        let Some((version, code)) = line.trim_end().split_once(' ') else { return false };
        let is_hex = |digit: u8| digit.is_ascii_hexdigit();
        if !version.bytes().all(|digit| digit.is_ascii_digit()) || !code.bytes().all(is_hex) {
            return false;
        }
        // The interpreter may be replaced by a newer one while the worker runs.
        self.head = format!(
            "__import__('marshal').loads(bytes.fromhex('{code}')) \
             if __import__('sys').hexversion == {version} else {}",
            self.template.head_expression()
        );
        true
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
    /// The program's file, in the working directory.
    pub program: String,
    /// What is in it; empty unless there are artifacts to tell from it.
    pub source: Vec<u8>,
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
        let source = if job.artifacts.is_empty() { Vec::new() } else { job.code.clone().into_bytes() };
        Self {
            id: job.id,
            environment: job.environment,
            network: job.enable_network,
            has_preload: !job.preload.is_empty(),
            stdin: job.stdin,
            program: program_name(&job.files),
            source,
            files: job.files,
            artifacts: job.artifacts,
            key: BASE64.encode(key),
            arguments: job.args,
            variables: job.env,
            code: BASE64.encode(xor(job.code.into_bytes(), &key)),
            preload: BASE64.encode(job.preload),
        }
    }

    /// What goes over the control socket once the filter is on: key, code, name of the program's file, number of
    /// arguments, arguments, variables; each ends in NUL. The code is there `with_code`, for a process whose prescript was rendered
    /// before the job came. `operators` are variables that the job's own override.
    pub fn assignment(&self, with_code: bool, operators: &[(&str, &str)]) -> Vec<u8> {
        let mut fields = Vec::with_capacity(self.key.len() + self.code.len() + 1024);
        let mut put = |parts: &[&str]| {
            parts.iter().for_each(|part| fields.extend_from_slice(part.as_bytes()));
            fields.push(0);
        };
        put(&[&self.key]);
        put(&[if with_code { &self.code } else { "" }]);
        put(&[&self.program]);
        put(&[&self.arguments.len().to_string()]);
        self.arguments.iter().for_each(|argument| put(&[argument]));
        operators.iter().for_each(|(name, value)| put(&[name, "=", value]));
        self.variables.iter().for_each(|(name, value)| put(&[name, "=", value]));
        fields
    }

    /// The `prescript` for a process that is to be this user and group.
    pub fn render(&self, prescript: &Prescript, uid: u32, gid: u32) -> String {
        let values = Values { uid, gid, network: self.network, preload: &self.preload, code: &self.code };
        prescript.template.launcher(&prescript.head, &values)
    }
}

/// The prescript for a zygote, which has uid 0 in its own namespace and no code: it does these imports. With
/// `fast_exit`, its jobs need not take themselves apart at their end; with `huge_pages` it moves its memory into such.
///
/// # Errors
/// The template lacks a section.
pub fn render_zygote(imports: &[String], fast_exit: bool, huge_pages: bool) -> Result<String, TemplateError> {
    let sections = [("zygote", true), ("fast_exit", fast_exit), ("huge_pages", huge_pages)];
    let kept: Vec<&str> = sections.into_iter().filter(|(_, kept)| *kept).map(|(name, _)| name).collect();
    let template = Template::cut(TEMPLATE, &kept)?;
    let imports: String = imports.iter().map(|module| format!("import {module}\n")).collect();
    let values = Values { uid: 0, gid: 0, network: false, preload: &BASE64.encode(imports), code: "" };
    Ok(template.launcher(&template.head_expression(), &values))
}

/// The program's file is `main.py` unless the job brings one, and then `__main__.py`; only a job that brings both gets
/// one with a number in it.
fn program_name(files: &[InputFile]) -> String {
    let is_free = |name: &String| {
        let is_there = |file: &InputFile| file.path.split('/').next() == Some(name);
        !files.iter().any(is_there)
    };
    let numbered = (2..).map(|number| format!("__main__{number}.py"));
    ["main.py", "__main__.py"]
        .map(str::to_owned)
        .into_iter()
        .chain(numbered)
        .find(is_free)
        .unwrap_or_default()
}

/// Encodes and decodes: the key is repeated over the code.
fn xor(mut code: Vec<u8>, key: &[u8; KEY_BYTES]) -> Vec<u8> {
    for (byte, key) in code.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
    code
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_cold_process_is_given_all_but_the_zygote() {
        let cold = Prescript::plain().unwrap();
        assert!(cold.source().contains("def prepare(") && !cold.source().contains("{{"));
        for only_zygotes in ["def set_up_zygote(", "SPARE", "def set_up_fast_exit("] {
            assert!(
                TEMPLATE.contains(only_zygotes) && !cold.source().contains(only_zygotes),
                "{only_zygotes}"
            );
        }
    }

    #[test]
    fn a_zygote_has_the_fast_exit_and_huge_pages_where_it_may() {
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let [with, without] = [true, false].map(|kept| render_zygote(&["json".into()], kept, kept).unwrap());
        for only in ["def set_up_fast_exit(", "HUGE_PAGES = 1"] {
            assert!(with.contains(&hex(only)) && !without.contains(&hex(only)), "{only}");
        }
        assert!([with, without].iter().all(|script| script.contains(&hex("def set_up_zygote("))));
    }

    #[test]
    fn only_a_compilers_line_is_taken() {
        let mut prescript = Prescript::plain().unwrap();
        for line in ["", "50991856", "50991856 e3'", "x e3", "Traceback (most recent call last):"] {
            assert!(!prescript.take_compiled(line), "{line}");
        }
        assert!(prescript.take_compiled("50991856 e300ff\n"));
        assert!(prescript.head.contains("== 50991856 else") && prescript.head.contains("fromhex('e300ff')"));
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
            program: "main.py".into(),
            source: Vec::new(),
            key: "a2V5".into(),
            arguments: vec!["one".into(), String::new()],
            variables: BTreeMap::from([("A".into(), "job=1".into())]),
            code: String::new(),
            preload: String::new(),
        };
        let assignment = payload.assignment(false, &[("A", "operator")]);
        assert_eq!(assignment, b"a2V5\0\0main.py\x002\0one\0\0A=operator\0A=job=1\0");
    }

    #[test]
    fn the_programs_file_is_none_that_the_job_brings() {
        for (paths, name) in [
            (&[][..], "main.py"),
            (&["src/main.py", "main.pyc"], "main.py"),
            (&["main.py"], "__main__.py"),
            (&["main.py/data.csv"], "__main__.py"),
            (&["__main__.py"], "main.py"),
            (&["main.py", "__main__.py", "__main__2.py"], "__main__3.py"),
        ] {
            let file = |path: &&str| InputFile { path: (*path).to_owned(), content: Vec::new() };
            let files: Vec<InputFile> = paths.iter().map(file).collect();
            assert_eq!(program_name(&files), name, "{paths:?}");
        }
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
