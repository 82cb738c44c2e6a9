//! Headers of messages: the names of ours, how a stranger's are read, and which are copied.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

/// What the headers of our own begin with.
pub(super) const OURS: &str = "x-sandpiper-";

/// How often a message was delivered before, where its queue does not count that.
pub(super) const DELIVERIES: &str = "x-sandpiper-deliveries";

/// Who published it, as the broker vouched for the message that the copy replaces.
pub(super) const USER: &str = "x-sandpiper-user";

/// A worker wrote these two.
pub(super) const SIGNATURE: &str = "x-sandpiper-signature";

/// How long the body of a dead message was, where it was not kept.
pub(super) const BODY_BYTES: &str = "x-sandpiper-body-bytes";

/// Most bytes of a header that is passed on or written: one frame has to hold all of them.
pub(super) const HEADER_MAX: usize = 1_024;

/// Most bytes of a stranger's headers that are copied, half of the usual frame.
pub(super) const HEADERS_MAX: usize = 64 << 10;

/// A header's text, if it has one.
pub(super) fn text(raw: &BasicProperties, name: &str) -> Option<String> {
    match raw.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// A header's number, if it has one.
pub(super) fn number(raw: &BasicProperties, name: &str) -> Option<u32> {
    let count = match raw.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongLongInt(count) => u32::try_from(*count).ok()?,
        AMQPValue::LongInt(count) => u32::try_from(*count).ok()?,
        AMQPValue::LongUInt(count) => *count,
        AMQPValue::ShortInt(count) => u32::try_from(*count).ok()?,
        AMQPValue::ShortUInt(count) => (*count).into(),
        AMQPValue::ShortShortInt(count) => u32::try_from(*count).ok()?,
        AMQPValue::ShortShortUInt(count) => (*count).into(),
        _ => return None,
    };
    Some(count)
}

/// A header as text, if it is text, a number or a time.
pub(super) fn described(raw: &BasicProperties, name: &str) -> Option<String> {
    shown(raw.headers().as_ref()?.inner().get(name)?)
}

/// The same of a header's value.
pub(super) fn shown(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        AMQPValue::LongLongInt(number) => Some(number.to_string()),
        AMQPValue::LongInt(number) => Some(number.to_string()),
        AMQPValue::Timestamp(seconds) => {
            let at = jiff::Timestamp::from_second(i64::try_from(*seconds).ok()?).ok()?;
            Some(at.to_string())
        }
        _ => None,
    }
}

/// What the broker wrote when it took the message out of a queue itself.
pub(super) fn last_death(raw: &BasicProperties) -> Option<&BTreeMap<ShortString, AMQPValue>> {
    let AMQPValue::FieldArray(deaths) = raw.headers().as_ref()?.inner().get("x-death")? else { return None };
    let AMQPValue::FieldTable(death) = deaths.as_slice().first()? else { return None };
    Some(death.inner())
}

/// What brokers write on messages that they let go or deliver again.
pub(super) const BROKERS: [&str; 5] =
    ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];

/// Headers but for those whose names begin like that.
pub(super) fn without(headers: &FieldTable, prefixes: &[&str]) -> FieldTable {
    let mut kept = FieldTable::default();
    for (name, value) in headers.inner() {
        if !prefixes.iter().any(|prefix| name.as_str().starts_with(prefix)) {
            kept.insert(name.clone(), value.clone());
        }
    }
    kept
}

/// The properties with headers that one frame of `room` bytes can hold: where a stranger's fill it, ours alone.
pub(super) fn fitting(properties: &BasicProperties, room: usize) -> BasicProperties {
    let headers = properties.headers().iter().flat_map(|headers| headers.inner());
    if headers.map(|(name, value)| name.as_str().len() + weight(value)).sum::<usize>() <= room {
        return properties.clone();
    }
    let mut ours = FieldTable::default();
    for (name, value) in properties.headers().iter().flat_map(|headers| headers.inner()) {
        if name.as_str().starts_with(OURS) {
            ours.insert(name.clone(), value.clone());
        }
    }
    properties.clone().with_headers(ours)
}

/// Headers that do no harm in another's hands: `CC` and `BCC` would have the broker send copies wherever a
/// stranger says, in our name, and ours are ours to write.
pub(super) fn copied_headers(raw: &BasicProperties) -> FieldTable {
    let mut copied = FieldTable::default();
    let mut bytes = 0;
    for (name, value) in raw.headers().iter().flat_map(|headers| headers.inner()) {
        bytes += name.as_str().len() + weight(value);
        let name_is_free = !["CC", "BCC"].contains(&name.as_str()) && !name.as_str().starts_with(OURS);
        if bytes <= HEADERS_MAX && name_is_free {
            copied.insert(name.clone(), value.clone());
        }
    }
    copied
}

/// About how many bytes a value takes on the wire, never less.
fn weight(value: &AMQPValue) -> usize {
    const SMALL: usize = 16;
    SMALL
        + match value {
            AMQPValue::ShortString(text) => text.as_str().len(),
            AMQPValue::LongString(text) => text.as_bytes().len(),
            AMQPValue::ByteArray(bytes) => bytes.as_slice().len(),
            AMQPValue::FieldArray(values) => values.as_slice().iter().map(weight).sum(),
            AMQPValue::FieldTable(table) => {
                table.inner().iter().map(|(name, value)| SMALL + name.as_str().len() + weight(value)).sum()
            }
            _ => 0,
        }
}
