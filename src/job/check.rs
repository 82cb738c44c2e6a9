//! The rules that a well-formed job must keep. Each broken one is a sentence naming field, fault and remedy.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::explain::{nearest, quote};
use super::metadata::METADATA_MAX;
use super::model::{Admission, InputFile, Job};
use super::python_variables;
use super::raw::{
    Capped, FILES_MAX, Object, PATTERNS_MAX, RawFile, RawJob, RawLimits, RawStdin, STRINGS_MAX, Strings,
};
use super::whole::Whole;
use crate::job::{Cpus, Limits};

/// Bytes of `code`, and of `preload`.
pub(super) const CODE_MAX: usize = 1 << 20;
/// Characters of `id`.
const ID_MAX: usize = 128;
/// Bytes of a file's path; Linux takes up to 4,095, of which the working directory needs some.
const PATH_MAX: usize = 1_024;
/// Bytes of one part of a path, as on any Linux file system.
const NAME_MAX: usize = 255;
/// What a file system in memory is made of. Where pages are larger, writing finds out.
const PAGE: usize = 4_096;
/// Bytes of a glob pattern.
const PATTERN_MAX: usize = 256;

/// Publishers differ in whether they pad; both are unambiguous.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Checks all but the metadata. The name of the job that comes back is left to the caller.
pub(super) fn check(raw: RawJob, admission: &Admission) -> Result<Job, String> {
    if let Some(id) = raw.id.as_deref().filter(|id| !is_id(id)) {
        return Err(format!(
            "`id` is {}; it must have 1 to {ID_MAX} of the characters A-Z a-z 0-9 . _ : -",
            quote(id)
        ));
    }
    if let Some(language) = raw.language.as_deref().filter(|language| *language != "python3") {
        return Err(format!("`language` is {}; the only language is `python3`", quote(language)));
    }
    let code = raw.code.ok_or("`code` is missing and must be given")?;
    check_source("code", &code)?;
    let preload = raw.preload.unwrap_or_default();
    check_source("preload", &preload)?;
    if !preload.is_empty() && !admission.allow_preload {
        return Err("`preload` is not allowed on this worker; leave it out, or have its operator set \
                    `sandbox.allow_preload`"
            .into());
    }
    let enable_network = raw.enable_network.unwrap_or_default();
    if enable_network && !admission.allow_network {
        return Err(
            "`enable_network` is not allowed on this worker; leave it out, or have its operator set \
                    `sandbox.allow_network`"
                .into(),
        );
    }
    let limits = check_limits(raw.timeout_ms, raw.limits, admission)?;
    let files = check_files(raw.files, limits.disk_bytes)?;
    check_disk(&code, &files, limits.disk_bytes)?;
    Ok(Job {
        id: String::new(),
        named: false,
        code,
        preload,
        enable_network,
        environment: check_environment(raw.environment, admission)?,
        stdin: check_stdin(raw.stdin)?,
        args: check_args(raw.args)?,
        env: check_env(raw.env)?,
        files,
        artifacts: check_artifacts(raw.artifacts)?,
        limits,
        deadline: raw.deadline.as_deref().map(check_deadline).transpose()?,
        stream: raw.stream.unwrap_or_default(),
        metadata: None,
    })
}

/// The sentence for metadata that is too large to be echoed.
pub(super) fn metadata_too_large() -> String {
    format!("`metadata` has more than {METADATA_MAX} bytes as JSON; the maximum is {METADATA_MAX}")
}

/// Whether `id` may name a job.
pub fn is_id(id: &str) -> bool {
    (1..=ID_MAX).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte))
}

fn check_source(field: &str, source: &str) -> Result<(), String> {
    at_most(field, "bytes", source.len(), CODE_MAX)
}

fn check_environment(name: Option<String>, admission: &Admission) -> Result<String, String> {
    let name = name.unwrap_or_else(|| "default".into());
    if admission.environments.contains(&name) {
        return Ok(name);
    }
    let known = nearest(&name, admission.environments.iter().cloned());
    let remedy = known.map_or_else(String::new, |(known, _)| format!("; did you mean {}?", quote(&known)));
    Err(format!("`environment` is {}, which this worker does not have{remedy}", quote(&name)))
}

fn check_limits(
    timeout_ms: Option<Whole>,
    limits: Option<Object<RawLimits>>,
    admission: &Admission,
) -> Result<Limits, String> {
    type Of = fn(&Limits) -> u64;
    let limits = limits.map_or_else(RawLimits::default, |limits| limits.0);
    let bounded = |field: &str, asked: Option<Whole>, of: Of| {
        let [minimum, default, maximum] =
            [&Limits::MINIMUM, &admission.bounds.default, &admission.bounds.maximum].map(of);
        match asked.map(|whole| whole.0) {
            None => Ok(default),
            Some(asked) if asked < minimum => {
                let why = if minimum > 1 { ", as python does not start with less" } else { "" };
                Err(format!("`{field}` is {asked}; it must be from {minimum} to {maximum}{why}"))
            }
            Some(asked) if asked > maximum => {
                Err(format!("`{field}` is {asked}, above this worker's maximum of {maximum}"))
            }
            Some(asked) => Ok(asked),
        }
    };
    Ok(Limits {
        timeout_ms: bounded("timeout_ms", timeout_ms, |limits| limits.timeout_ms)?,
        cpu_ms: bounded("limits.cpu_ms", limits.cpu_ms, |limits| limits.cpu_ms)?,
        memory_bytes: bounded("limits.memory_bytes", limits.memory_bytes, |limits| limits.memory_bytes)?,
        output_bytes: bounded("limits.output_bytes", limits.output_bytes, |limits| limits.output_bytes)?,
        processes: bounded("limits.processes", limits.processes, |limits| limits.processes)?,
        open_files: bounded("limits.open_files", limits.open_files, |limits| limits.open_files)?,
        disk_bytes: bounded("limits.disk_bytes", limits.disk_bytes, |limits| limits.disk_bytes)?,
        cpus: match (limits.cpus, admission.bounds.maximum.cpus) {
            (None, _) => admission.bounds.default.cpus,
            (Some(asked), _) if asked < Cpus::MINIMUM => {
                let minimum = Cpus::MINIMUM;
                return Err(format!("`limits.cpus` is {asked}; it must be {minimum} or more processors"));
            }
            (Some(asked), Some(maximum)) if asked > maximum => {
                return Err(format!("`limits.cpus` is {asked}, above this worker's maximum of {maximum}"));
            }
            (asked, _) => asked,
        },
    })
}

fn check_stdin(stdin: Option<RawStdin>) -> Result<Vec<u8>, String> {
    match stdin {
        None => Ok(Vec::new()),
        Some(RawStdin::Text(text)) => Ok(text.into_bytes()),
        Some(RawStdin::Encoded(encoded)) => decode("stdin.base64", &encoded.base64),
    }
}

fn check_args(args: Option<Capped<String, STRINGS_MAX>>) -> Result<Vec<String>, String> {
    let Some(args) = args else { return Ok(Vec::new()) };
    at_most("args", "entries", args.count, STRINGS_MAX)?;
    match args.items.iter().position(|arg| arg.contains('\0')) {
        Some(index) => Err(format!("`args[{index}]` holds a NUL character, which no argument can")),
        None => Ok(args.items),
    }
}

fn check_env(env: Option<Strings>) -> Result<BTreeMap<String, String>, String> {
    let Some(env) = env else { return Ok(BTreeMap::new()) };
    at_most("env", "entries", env.count, STRINGS_MAX)?;
    for (name, value) in &env.items {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!(
                "`env` has the name {}; a name must not be empty or hold `=` or NUL",
                quote(name)
            ));
        }
        if value.contains('\0') {
            return Err(format!(
                "{} holds a NUL character, which no variable can",
                quote(&format!("env.{name}"))
            ));
        }
        python_variables::check(name, value)?;
    }
    Ok(env.items)
}

fn check_files(
    files: Option<Capped<Object<RawFile>, FILES_MAX>>,
    disk_bytes: u64,
) -> Result<Vec<InputFile>, String> {
    let Some(files) = files else { return Ok(Vec::new()) };
    at_most("files", "entries", files.count, FILES_MAX)?;
    let mut checked = Vec::with_capacity(files.items.len());
    let mut total: u64 = 0;
    for (index, Object(file)) in files.items.into_iter().enumerate() {
        let path = check_path(&file.path).map_err(|fault| {
            format!(
                "`files[{index}].path` is {}, which {fault}; give a relative path such as `data/in.csv`",
                quote(&file.path)
            )
        })?;
        let content = match (file.content, file.base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => decode(&format!("files[{index}].base64"), &encoded)?,
            (Some(_), Some(_)) => {
                return Err(format!("`files[{index}]` has both `content` and `base64`; give one of them"));
            }
            (None, None) => {
                return Err(format!("`files[{index}]` has no content; give `content` or `base64`"));
            }
        };
        total = total.saturating_add(u64::try_from(content.len()).unwrap_or(u64::MAX));
        checked.push(InputFile { path, content });
    }
    if total > disk_bytes {
        return Err(format!(
            "`files` hold {total} bytes, above the job's `limits.disk_bytes` of {disk_bytes}"
        ));
    }
    check_distinct(&checked)?;
    Ok(checked)
}

/// The program is a file as well, and each file takes whole pages. A limit below one page is one page.
fn check_disk(code: &str, files: &[InputFile], disk_bytes: u64) -> Result<(), String> {
    let pages = |bytes: usize| bytes.div_ceil(PAGE);
    let taken = files.iter().map(|file| pages(file.content.len())).sum::<usize>() + pages(code.len());
    let room = disk_bytes.div_ceil(PAGE as u64);
    if u64::try_from(taken).is_ok_and(|taken| taken <= room) {
        return Ok(());
    }
    let taken = taken.saturating_mul(PAGE);
    Err(format!(
        "`code` and `files` take {taken} bytes of disk, each in whole pages of {PAGE}, above the job's \
         `limits.disk_bytes` of {disk_bytes}; raise the limit or send less"
    ))
}

/// No file twice, and none where another needs a directory.
fn check_distinct(files: &[InputFile]) -> Result<(), String> {
    let mut paths = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        if !paths.insert(file.path.as_str()) {
            return Err(format!(
                "`files[{index}].path` is {}, which is given twice; give each path once",
                quote(&file.path)
            ));
        }
    }
    for (index, file) in files.iter().enumerate() {
        let parent =
            file.path.match_indices('/').map(|(at, _)| &file.path[..at]).find(|dir| paths.contains(dir));
        if let Some(parent) = parent {
            return Err(format!(
                "`files[{index}].path` is {}, but {} is a file too; rename one of them",
                quote(&file.path),
                quote(parent)
            ));
        }
    }
    Ok(())
}

/// The path in its plainest form, or what is wrong with it.
fn check_path(path: &str) -> Result<String, &'static str> {
    if path.is_empty() {
        return Err("is empty");
    }
    if path.len() > PATH_MAX {
        return Err("is longer than 1024 bytes");
    }
    if path.contains('\0') {
        return Err("holds a NUL character");
    }
    if path.starts_with('/') {
        return Err("is absolute");
    }
    if path.split('/').any(|part| part == "..") {
        return Err("could leave the working directory");
    }
    if path.ends_with('/') || path.ends_with("/.") {
        return Err("names a directory");
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() {
        return Err("names a directory");
    }
    if parts.iter().any(|part| part.len() > NAME_MAX) {
        return Err("has a part longer than 255 bytes");
    }
    Ok(parts.join("/"))
}

fn check_artifacts(patterns: Option<Capped<String, PATTERNS_MAX>>) -> Result<Vec<String>, String> {
    let Some(patterns) = patterns else { return Ok(Vec::new()) };
    at_most("artifacts", "entries", patterns.count, PATTERNS_MAX)?;
    for (index, pattern) in patterns.items.iter().enumerate() {
        let fault = if pattern.is_empty() {
            Some("is empty".to_owned())
        } else if pattern.len() > PATTERN_MAX {
            Some(format!("is longer than {PATTERN_MAX} bytes"))
        } else if pattern.contains('\0') {
            Some("holds a NUL character".to_owned())
        } else if pattern.starts_with('/') {
            Some("is absolute".to_owned())
        } else if pattern.split('/').any(|part| part == "..") {
            Some("could leave the working directory".to_owned())
        } else {
            globset::Glob::new(pattern).err().map(|error| format!("is no glob pattern ({})", error.kind()))
        };
        if let Some(fault) = fault {
            return Err(format!(
                "`artifacts[{index}]` is {}, which {fault}; give a relative pattern such as `out/*.png`",
                quote(pattern)
            ));
        }
    }
    Ok(patterns.items)
}

fn check_deadline(text: &str) -> Result<jiff::Timestamp, String> {
    // jiff reads more than RFC 3339 allows: the shape comes first.
    is_rfc3339(text).then(|| text.parse().ok()).flatten().ok_or_else(|| {
        format!("`deadline` is {}; it must be an RFC 3339 time such as `2030-01-31T12:00:00Z`", quote(text))
    })
}

/// `YYYY-MM-DDTHH:MM:SS`, a fraction or none, then `Z` or an offset.
fn is_rfc3339(text: &str) -> bool {
    let shaped = |text: &[u8], shape: &[u8]| {
        text.len() == shape.len()
            && text.iter().zip(shape).all(|(byte, shape)| match shape {
                b'0' => byte.is_ascii_digit(),
                b'T' => matches!(byte, b'T' | b't'),
                b'+' => matches!(byte, b'+' | b'-'),
                other => byte == other,
            })
    };
    let Some((date, rest)) = text.as_bytes().split_at_checked(19) else { return false };
    let zone = match rest.strip_prefix(b".") {
        Some(fraction) => {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if !(1..=9).contains(&digits) {
                return false;
            }
            &fraction[digits..]
        }
        None => rest,
    };
    shaped(date, b"0000-00-00T00:00:00") && (matches!(zone, b"Z" | b"z") || shaped(zone, b"+00:00"))
}

fn at_most(field: &str, unit: &str, count: usize, maximum: usize) -> Result<(), String> {
    if count <= maximum {
        return Ok(());
    }
    Err(format!("`{field}` has {count} {unit}; the maximum is {maximum}"))
}

fn decode(field: &str, encoded: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(encoded).map_err(|error| {
        format!("`{field}` is not base64 ({error}); encode with the standard alphabet, without line breaks")
    })
}
