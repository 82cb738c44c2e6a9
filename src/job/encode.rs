//! A result as JSON that fits into a message, whatever the job printed.
//!
//! A control character takes six bytes in JSON, so the size is known only of the encoded form. What is too
//! large gives way in this order: whole artifacts, the largest first; then the ends of both streams, so that
//! each keeps at least half of the room where it needs it; then, for a room that holds no streams at all,
//! what only explains.

use crate::job::reply::{Encoding, Reply, ReplyArtifact};

impl Reply {
    /// The result as JSON of at most `max_bytes`. Only a room too small for the bare fields, some 1.5 KiB,
    /// is exceeded.
    pub fn encode(&self, max_bytes: usize) -> Vec<u8> {
        let json = to_json(self);
        if json.len() <= max_bytes {
            return json;
        }
        let mut excess = json.len() - max_bytes;
        drop(json);
        let mut reply = self.clone();
        if !reply.artifacts.is_empty() {
            excess = drop_artifacts(&mut reply, excess, max_bytes);
        }
        if excess > 0 {
            cut_streams(&mut reply, max_bytes);
        }
        let mut json = to_json(&reply);
        if json.len() > max_bytes {
            reply.metadata = None;
            reply.blocked_syscalls.clear();
            reply.error = reply.error.map(|error| error.chars().take(200).collect());
            json = to_json(&reply);
        }
        json
    }
}

fn to_json(reply: &Reply) -> Vec<u8> {
    // Strings, numbers and maps with string keys always encode; writing into memory does not fail.
    serde_json::to_vec(reply).unwrap_or_default()
}

/// Drops artifacts until `excess` bytes are gone, and says so in `error`. Returns what is still too much.
fn drop_artifacts(reply: &mut Reply, excess: usize, max_bytes: usize) -> usize {
    let before = reply.artifacts.len();
    let cost = |artifact: &ReplyArtifact| artifact.base64.len() + json_len(&artifact.path) + 30;
    // The note takes room as well.
    let mut excess = excess + 256;
    let mut order: Vec<usize> = (0..before).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(cost(&reply.artifacts[index])));
    let mut dropped = vec![false; before];
    for index in order {
        if excess == 0 {
            break;
        }
        dropped[index] = true;
        excess = excess.saturating_sub(cost(&reply.artifacts[index]));
    }
    let count = dropped.iter().filter(|dropped| **dropped).count();
    let mut dropped = dropped.into_iter();
    reply.artifacts.retain(|_| !dropped.next().unwrap_or(false));
    let note = format!(
        "{count} of {before} artifacts were left out, as the result may have at most {max_bytes} bytes"
    );
    reply.error = Some(match reply.error.take() {
        Some(error) => format!("{error}; {note}"),
        None => note,
    });
    excess
}

/// Cuts the streams to what room the other fields leave.
fn cut_streams(reply: &mut Reply, max_bytes: usize) {
    let (stdout, stderr) = (std::mem::take(&mut reply.stdout), std::mem::take(&mut reply.stderr));
    let room = max_bytes.saturating_sub(to_json(reply).len());
    let (out_len, err_len) = (json_len(&stdout), json_len(&stderr));
    let half = room / 2;
    let (out_room, err_room) = match (out_len <= half, err_len <= half) {
        (true, _) => (out_len, room - out_len),
        (_, true) => (room - err_len, err_len),
        _ => (half, half),
    };
    // `true` is shorter than `false`: setting the flags never adds.
    (reply.stdout, reply.stdout_truncated) =
        cut(stdout, out_room, reply.stdout_encoding, reply.stdout_truncated);
    (reply.stderr, reply.stderr_truncated) =
        cut(stderr, err_room, reply.stderr_encoding, reply.stderr_truncated);
}

/// The longest front of `text` that takes at most `room` bytes in JSON and is still whole in its encoding.
fn cut(mut text: String, room: usize, encoding: Encoding, truncated: bool) -> (String, bool) {
    let mut left = room;
    let fits = text.char_indices().find_map(|(at, char)| match left.checked_sub(char_len(char)) {
        Some(rest) => {
            left = rest;
            None
        }
        None => Some(at),
    });
    let Some(end) = fits else { return (text, truncated) };
    text.truncate(match encoding {
        Encoding::Utf8 => end,
        // Four characters carry three bytes.
        Encoding::Base64 => end - end % 4,
    });
    (text, true)
}

fn json_len(text: &str) -> usize {
    text.chars().map(char_len).sum()
}

/// What a character takes inside a JSON string, as serde_json writes it.
fn char_len(char: char) -> usize {
    match char {
        '"' | '\\' | '\x08' | '\x0c' | '\n' | '\r' | '\t' => 2,
        '\0'..='\x1f' => 6,
        other => other.len_utf8(),
    }
}
