//! Defaults, file, environment variables, flags: laid over each other, each value knowing where it came from.
//!
//! The tree of defaults says which keys there are and of which type each is, so an unknown key or a wrong
//! type is refused where it is written.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use super::ConfigError;
use super::raw::{Raw, RawEnvironment};
use crate::config::{Config, Environment};
use crate::job::explain::{explain, nearest, quote, unknown};

/// What every environment variable of ours begins with.
const PREFIX: &str = "SANDPIPER_";
/// The one variable that names no key: the configuration file.
const FILE_VARIABLE: &str = "SANDPIPER_CONFIG";

/// The keys as set so far, and who set them.
pub(super) struct Layers {
    tree: Table,
    origins: Origins,
}

/// Which key was set by what; a key that is not here has its default.
#[derive(Debug, Default)]
pub(super) struct Origins(BTreeMap<String, String>);

impl Origins {
    /// Whether somebody set `key`.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// An error on `key`, told with the place where it was set.
    pub(super) fn error(&self, key: &str, sentence: String) -> ConfigError {
        let mut path = key;
        loop {
            if let Some(origin) = self.0.get(path) {
                return ConfigError::Invalid { origin: origin.clone(), sentence };
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return ConfigError::Invalid { origin: "the configuration".into(), sentence },
            }
        }
    }
}

impl Layers {
    pub(super) fn defaults() -> Self {
        Self { tree: Config::defaults_as_written(), origins: Origins::default() }
    }

    /// Lays a file over what is set so far.
    pub(super) fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        // The message alone: the whole error repeats the line, and that may hold a password.
        let file: Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            line: error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1),
            message: error.message().to_owned(),
        })?;
        let template = environment()?;
        merge(&mut self.tree, file, "", &path.display().to_string(), &template, &mut self.origins)
    }

    /// Lays environment variables over what is set so far; those of others are passed over.
    pub(super) fn variables(&mut self, variables: &[(String, String)]) -> Result<(), ConfigError> {
        for (name, value) in variables {
            let Some(rest) = name.strip_prefix(PREFIX).filter(|_| name != FILE_VARIABLE) else { continue };
            if is_service_link(rest) {
                continue;
            }
            let key = rest.to_lowercase().replace("__", ".");
            let origin = format!("environment variable {name}");
            if !rest.contains("__") || self.find(&key)?.is_none() {
                return Err(self.unknown_variable(&key, origin));
            }
            self.set(&key, value, origin)?;
        }
        Ok(())
    }

    /// Lays one flag over what is set so far.
    pub(super) fn flag(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let origin = "the command line".to_owned();
        if self.find(key)?.is_none() {
            return Err(ConfigError::Invalid {
                origin,
                sentence: unknown(key, leaves(&self.tree, "").into_iter()),
            });
        }
        self.set(key, value, origin)
    }

    /// The keys as a typed whole.
    pub(super) fn finish(self) -> Result<(Raw, Origins), ConfigError> {
        match serde_path_to_error::deserialize(Value::Table(self.tree)) {
            Ok(raw) => Ok((raw, self.origins)),
            Err(error) => {
                let key = error.path().to_string();
                let sentence = explain(&key, error.inner().message(), &[]);
                Err(self.origins.error(&key, sentence))
            }
        }
    }

    /// The value at `key`, if there is such a key. A new environment comes into being with its defaults.
    fn find(&mut self, key: &str) -> Result<Option<&mut Value>, ConfigError> {
        let mut parts = key.split('.');
        let mut at = parts.next().and_then(|section| self.tree.get_mut(section));
        let mut template = if key.starts_with("environments.") { Some(environment()?) } else { None };
        for part in parts {
            at = match at {
                Some(Value::Table(table)) => match template.take() {
                    Some(template) => Some(table.entry(part).or_insert(Value::Table(template))),
                    None => table.get_mut(part),
                },
                _ => None,
            };
        }
        Ok(at)
    }

    fn set(&mut self, key: &str, text: &str, origin: String) -> Result<(), ConfigError> {
        let Some(slot) = self.find(key)? else { return Ok(()) };
        let text = text.trim();
        let parsed = match slot {
            _ if key == "amqp.url" => addresses(text),
            _ if takes_a_list(key) && text.starts_with(['[', '/']) => list(text),
            Value::Array(_) if takes_a_list(key) => switch(text),
            Value::Integer(_) => text.parse().ok().map(Value::Integer).ok_or("must be a whole number"),
            Value::Boolean(_) => switch(text),
            Value::Array(_) => list(text),
            Value::Table(_) => Err("is a section; set one of its keys"),
            _ => Ok(Value::String(text.to_owned())),
        };
        match parsed {
            Ok(value) => *slot = value,
            Err(fault) => return Err(ConfigError::Invalid { origin, sentence: format!("`{key}` {fault}") }),
        }
        self.origins.0.insert(key.to_owned(), origin);
        Ok(())
    }

    fn unknown_variable(&self, key: &str, origin: String) -> ConfigError {
        let variable = |key: &str| format!("{PREFIX}{}", key.replace('.', "__").to_uppercase());
        let section = key.split_once('.').map_or("", |(section, _)| section);
        let all = leaves(&self.tree, "");
        let own: Vec<String> =
            all.iter().filter(|leaf| leaf.split('.').next() == Some(section)).cloned().collect();
        let known = if own.is_empty() { all } else { own };
        let hint = nearest(key, known.into_iter())
            .map_or_else(String::new, |(key, _)| format!("; did you mean {}?", variable(&key)));
        ConfigError::Invalid { origin, sentence: format!("names no key of the configuration{hint}") }
    }
}

/// The file that the environment names.
pub(super) fn file_variable(variables: &[(String, String)]) -> Option<&Path> {
    variables
        .iter()
        .find(|(name, value)| name == FILE_VARIABLE && !value.is_empty())
        .map(|(_, value)| Path::new(value))
}

/// Kubernetes gives every pod `SANDPIPER_SERVICE_HOST`, `SANDPIPER_PORT_9464_TCP_ADDR` and the like where a
/// service is called `sandpiper`. They are not meant for us.
fn is_service_link(rest: &str) -> bool {
    let rest = format!("_{rest}");
    !rest.contains("__")
        && (rest.ends_with("_SERVICE_HOST")
            || rest.contains("_SERVICE_PORT")
            || rest.ends_with("_PORT")
            || rest
                .split("_PORT_")
                .skip(1)
                .any(|rest| rest.starts_with(|first: char| first.is_ascii_digit())))
}

fn merge(
    base: &mut Table,
    over: Table,
    path: &str,
    origin: &str,
    template: &Table,
    origins: &mut Origins,
) -> Result<(), ConfigError> {
    for (name, value) in over {
        let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let fault = |sentence| Err(ConfigError::Invalid { origin: origin.to_owned(), sentence });
        if path == "environments" && value.is_table() && !base.contains_key(&name) {
            base.insert(name.clone(), Value::Table(template.clone()));
        }
        let Some(slot) = base.get_mut(&name) else {
            let siblings: Vec<String> = leaves(base, path);
            return fault(unknown(&key, siblings.into_iter()));
        };
        match (slot, value) {
            (Value::Table(base), Value::Table(over)) => merge(base, over, &key, origin, template, origins)?,
            (slot, value)
                if slot.same_type(&value)
                    || key == "amqp.url" && value.is_array()
                    || takes_a_list(&key) && (value.is_array() || value.is_bool()) =>
            {
                *slot = value;
                origins.0.insert(key, origin.to_owned());
            }
            (slot, value) => {
                let sentence = format!("{} must be {}, not {}", quote(&key), kind(slot), kind(&value));
                return fault(sentence);
            }
        }
    }
    Ok(())
}

/// The full names of all keys under `path`.
fn leaves(table: &Table, path: &str) -> Vec<String> {
    let key = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let mut keys = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) => {
                // A section itself may be what was meant.
                keys.push(key(name));
                keys.extend(leaves(inner, &key(name)));
            }
            _ => keys.push(key(name)),
        }
    }
    keys
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// A switch that may be a list instead: what is switched on.
fn takes_a_list(key: &str) -> bool {
    key.starts_with("environments.") && key.ends_with(".allow_exec")
}

fn switch(text: &str) -> Result<Value, &'static str> {
    text.parse().ok().map(Value::Boolean).ok_or("must be true or false")
}

/// A TOML array, or items between commas.
fn list(text: &str) -> Result<Value, &'static str> {
    if text.starts_with('[') {
        let document: Result<Table, _> = format!("list = {text}").parse();
        return document.ok().and_then(|mut document| document.remove("list")).ok_or("is not a list in TOML");
    }
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
}

/// Like a list, but a comma may belong to a password: only one before a scheme separates.
fn addresses(text: &str) -> Result<Value, &'static str> {
    if text.starts_with('[') {
        return list(text);
    }
    let mut addresses: Vec<String> = Vec::new();
    for part in text.split(',') {
        match addresses.last_mut() {
            Some(last) if !part.trim_start().starts_with("amqp") => {
                last.push(',');
                last.push_str(part);
            }
            _ => addresses.push(part.trim().to_owned()),
        }
    }
    Ok(Value::Array(addresses.into_iter().map(Value::String).collect()))
}

fn environment() -> Result<Table, ConfigError> {
    Table::try_from(RawEnvironment::from(Environment::default())).map_err(|error| ConfigError::Invalid {
        origin: "the default environment".into(),
        sentence: error.to_string(),
    })
}
