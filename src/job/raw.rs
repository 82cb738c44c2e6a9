//! A job as its publisher writes it: the field names and types of the contract, nothing checked yet.
//!
//! Reading takes memory in proportion to the body and no more: lists and maps stop growing at a count that
//! no acceptable job reaches, and go on only being read. The JSON Schema comes from these same types.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::explain::{explain, quote};
use super::json::{Fault, Members};
use super::limits::Cpus;
use super::metadata::{Metadata, Written};
use super::whole::Whole;

/// Entries of `args`, and of `env`.
pub(super) const STRINGS_MAX: usize = 1_024;
/// Entries of `files`.
pub(super) const FILES_MAX: usize = 256;
/// Entries of `artifacts`.
pub(super) const PATTERNS_MAX: usize = 64;

/// One program to run, and how. An unknown field is refused; null counts as absent.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Job", title = "Sandpiper job")]
pub(super) struct RawJob {
    /// Names the job in its result; the message's `message_id` where absent, else a new UUIDv7.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9._:-]+$"))]
    pub(super) id: Option<String>,
    /// The language of the code.
    #[schemars(extend("enum" = ["python3", null], "default" = "python3"))]
    pub(super) language: Option<String>,
    /// The source, at most 1 MiB.
    #[schemars(required)]
    pub(super) code: Option<String>,
    /// Code that runs before the system call filter, at most 1 MiB; refused unless the operator allows it.
    #[schemars(extend("default" = ""))]
    pub(super) preload: Option<String>,
    /// Use the host's network; refused unless the operator allows it.
    #[schemars(extend("default" = false))]
    pub(super) enable_network: Option<bool>,
    /// One of the interpreters that the operator has named.
    #[schemars(extend("default" = "default"))]
    pub(super) environment: Option<String>,
    /// Standard input: text, or bytes as base64.
    #[schemars(extend("default" = ""))]
    pub(super) stdin: Option<RawStdin>,
    /// `sys.argv[1:]`.
    #[schemars(with = "Option<Vec<String>>", length(max = 1024), extend("default" = []))]
    pub(super) args: Option<Capped<String, STRINGS_MAX>>,
    /// Added to the process's environment variables.
    #[schemars(with = "Option<BTreeMap<String, String>>", extend("default" = {}, "maxProperties" = 1024))]
    pub(super) env: Option<Strings>,
    /// Laid into the working directory before the code runs.
    #[schemars(with = "Option<Vec<RawFile>>", length(max = 256), extend("default" = []))]
    pub(super) files: Option<Capped<Object<RawFile>, FILES_MAX>>,
    /// Glob patterns of files in the working directory to return, such as `out/*.png`.
    #[schemars(with = "Option<Vec<String>>", length(max = 64), extend("default" = []))]
    pub(super) artifacts: Option<Capped<String, PATTERNS_MAX>>,
    /// Wall time in milliseconds, from the hand-over of the code.
    /// At most 300,000 unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 1), extend("default" = 5000))]
    pub(super) timeout_ms: Option<Whole>,
    /// Further limits; the operator's defaults where absent.
    #[schemars(with = "Option<RawLimits>")]
    pub(super) limits: Option<Object<RawLimits>>,
    /// RFC 3339; past it the job is not run.
    #[schemars(extend("format" = "date-time"))]
    pub(super) deadline: Option<String>,
    /// Send output while it runs, before the result.
    #[schemars(extend("default" = false))]
    pub(super) stream: Option<bool>,
    /// Echoed in the result as it is written; at most 4 KiB as JSON without spaces.
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub(super) metadata: Option<Written>,
}

/// What the job may use beyond its wall time.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "JobLimits")]
pub(super) struct RawLimits {
    /// CPU time in milliseconds, user and system, over all processes.
    /// At most 600,000 unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 1), extend("default" = 10000))]
    pub(super) cpu_ms: Option<Whole>,
    /// Memory in bytes over all processes; files in the working directory count.
    /// At least 16 MiB, with which python starts; at most 1 GiB unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 16777216), extend("default" = 268435456))]
    pub(super) memory_bytes: Option<Whole>,
    /// Bytes of standard output, and as many of standard error.
    /// At most 8 MiB unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 1), extend("default" = 1048576))]
    pub(super) output_bytes: Option<Whole>,
    /// Processes at one time, threads included.
    /// At most 128 unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 1), extend("default" = 32))]
    pub(super) processes: Option<Whole>,
    /// Open descriptors of one process.
    /// At least 16, with which python starts; at most 1,024 unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 16), extend("default" = 256))]
    pub(super) open_files: Option<Whole>,
    /// Bytes in the working directory and `/tmp` together.
    /// At most 512 MiB unless the operator has set another maximum.
    #[schemars(with = "Option<u64>", range(min = 1), extend("default" = 67108864))]
    pub(super) disk_bytes: Option<Whole>,
    /// Processors that all processes may use together, such as 1.5; no cap by default.
    /// At most the processors of the worker's machine unless the operator has set less. A worker without control groups
    /// that share the processor caps nothing, and the result's `limits` have no `cpus` then.
    #[schemars(with = "Option<f64>", range(min = 0.01))]
    pub(super) cpus: Option<Cpus>,
}

/// A file for the working directory: its path, and its content either as text or as base64.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "JobFile", extend("oneOf" = [{"required": ["content"]}, {"required": ["base64"]}]))]
pub(super) struct RawFile {
    /// Relative, and staying inside the working directory.
    #[schemars(length(min = 1, max = 1024))]
    pub(super) path: String,
    /// Its content as text.
    pub(super) content: Option<String>,
    /// Its content as base64.
    #[schemars(extend("contentEncoding" = "base64"))]
    pub(super) base64: Option<String>,
}

/// Bytes, written as text or as base64.
#[derive(Debug, JsonSchema)]
#[schemars(untagged, rename = "JobInput")]
pub(super) enum RawStdin {
    /// The bytes are this text in UTF-8.
    Text(String),
    /// The bytes are encoded.
    Encoded(Encoded),
}

/// Bytes as base64.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Base64")]
pub(super) struct Encoded {
    /// Standard alphabet; padding may be left out.
    #[schemars(extend("contentEncoding" = "base64"))]
    pub(super) base64: String,
}

impl<'de> Deserialize<'de> for RawStdin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputVisitor;
        impl<'de> Visitor<'de> for InputVisitor {
            type Value = RawStdin;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or {\"base64\": …}")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<RawStdin, E> {
                Ok(RawStdin::Text(text.to_owned()))
            }
            fn visit_string<E: Error>(self, text: String) -> Result<RawStdin, E> {
                Ok(RawStdin::Text(text))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawStdin, A::Error> {
                Encoded::deserialize(MapAccessDeserializer::new(map)).map(RawStdin::Encoded)
            }
        }
        deserializer.deserialize_any(InputVisitor)
    }
}

/// A struct that is written as an object only; serde would take a list of its fields as well.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = T;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(ObjectVisitor(PhantomData)).map(Object)
    }
}

/// A list of which at most `MAX` entries are kept; how many there were is known.
#[derive(Debug)]
pub(super) struct Capped<T, const MAX: usize> {
    pub(super) items: Vec<T>,
    pub(super) count: usize,
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Capped<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CappedVisitor<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for CappedVisitor<T, MAX> {
            type Value = Capped<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut list = Capped { items: Vec::new(), count: 0 };
                while list.count < MAX {
                    let Some(item) = seq.next_element()? else { return Ok(list) };
                    list.items.push(item);
                    list.count += 1;
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    list.count += 1;
                }
                Ok(list)
            }
        }
        deserializer.deserialize_seq(CappedVisitor(PhantomData))
    }
}

/// A map of text to text, capped like a list, its keys given once.
#[derive(Debug)]
pub(super) struct Strings {
    pub(super) items: BTreeMap<String, String>,
    pub(super) count: usize,
}

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = Strings;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of text values")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut strings = Strings { items: BTreeMap::new(), count: 0 };
                while strings.count < STRINGS_MAX {
                    let Some(key) = map.next_key::<String>()? else { return Ok(strings) };
                    if strings.items.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
                    }
                    strings.items.insert(key, map.next_value()?);
                    strings.count += 1;
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    strings.count += 1;
                }
                Ok(strings)
            }
        }
        deserializer.deserialize_any(StringsVisitor)
    }
}

/// Fields that a publisher may have put at the wrong level.
const ELSEWHERE: [&str; 8] = [
    "timeout_ms",
    "limits.cpu_ms",
    "limits.memory_bytes",
    "limits.output_bytes",
    "limits.processes",
    "limits.open_files",
    "limits.disk_bytes",
    "limits.cpus",
];

/// Reads a body as a job, or says in one sentence why it is none.
pub(super) fn read(body: &[u8]) -> Result<RawJob, String> {
    if body.is_empty() {
        return Err("the body is empty; it must be one JSON object".into());
    }
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err("the body starts with a byte order mark; send UTF-8 without one".into());
    }
    let text = std::str::from_utf8(body).map_err(|error| not_text(body, error.valid_up_to()))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let job: Object<RawJob> = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        describe(text, &path, error.inner())
    })?;
    json.end().map_err(|error| {
        format!("the body goes on after its JSON object, at line {} column {}", error.line(), error.column())
    })?;
    if let Some(Written::Fits(metadata)) = &job.0.metadata
        && !metadata.is_readable()
        && let Some(fault) = Fault::find(text)
    {
        return Err(fault.sentence(text, "it cannot be read"));
    }
    Ok(job.0)
}

/// What makes a body no JSON object at all, in one sentence.
pub(crate) fn no_object(body: &[u8]) -> Option<String> {
    match serde_json::from_slice::<Object<IgnoredAny>>(body) {
        Ok(_) => None,
        Err(_) => read(body).err().or_else(|| Some("the body must be one JSON object".into())),
    }
}

/// Bytes that are no text are often compressed, and nothing says so.
fn not_text(body: &[u8], at: usize) -> String {
    let compression = match body {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd"),
        _ => None,
    };
    match compression {
        Some(name) => {
            format!(
                "the body looks compressed with {name}; say so in the property `content_encoding`: \"{name}\""
            )
        }
        None => format!("the body is not UTF-8: the byte at {at} is invalid"),
    }
}

fn describe(text: &str, path: &str, error: &serde_json::Error) -> String {
    let said = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = said.strip_suffix(&place).unwrap_or(&said);
    if !error.is_data() {
        let reason = format!("{message}{place}");
        return match Fault::find(text) {
            Some(fault) => fault.sentence(text, &reason),
            None if path == "." => format!("the body is not valid JSON: {reason}"),
            None => format!("the body is not valid JSON: {reason}, in {}", quote(path)),
        };
    }
    if path == "." && message.starts_with("invalid type") {
        return "the body must be one JSON object".into();
    }
    explain(path, message, &ELSEWHERE)
}

/// What names a job to its requester, from a body that could not be read as one.
#[derive(Debug, Default)]
pub(super) struct Salvage {
    pub(super) id: Option<String>,
    pub(super) metadata: Option<Metadata>,
}

impl Salvage {
    /// Takes what can be had from `body`, before and behind of what is wrong with it.
    pub(super) fn from_body(body: &[u8]) -> Self {
        let mut salvage = Self::default();
        for (name, value) in Members::of(body) {
            match &body[name] {
                b"\"id\"" => salvage.id = serde_json::from_slice(&body[value]).ok(),
                b"\"metadata\"" => salvage.metadata = Metadata::salvage(&body[value]),
                _ => {}
            }
        }
        salvage
    }
}
