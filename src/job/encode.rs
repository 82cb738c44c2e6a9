//! A result as JSON that fits into a message, whatever the job printed.
//!
//! A control character takes six bytes in JSON, so the size is known only of the encoded form. What is too
//! large gives way in this order: whole artifacts, the largest first; then the ends of both streams, so that
//! each keeps at least half of the room where it needs it; then, for a room that holds no streams at all,
//! what only explains.

use crate::job::reply::{Encoding, Reply, ReplyArtifact};

impl Reply {
    /// The result as JSON of at most `max_bytes`, and never more than that in memory. Only a room too small for the
    /// bare fields, some 1.5 KiB, is exceeded.
    pub fn encode(self, max_bytes: usize) -> Vec<u8> {
        self.encode_for(max_bytes, usize::MAX)
    }

    /// The same where the broker takes only `largest` bytes. If the result has to be cut for that, it says so.
    pub fn encode_for(mut self, max_bytes: usize, largest: usize) -> Vec<u8> {
        let room = max_bytes.min(largest);
        if self.surely_fits(room) {
            return to_json(&self, 1 << 10);
        }
        let size = Size::of(&mut self);
        if largest < max_bytes && size.all() > largest {
            self.note(&format!(
                "the result was cut to {largest} bytes, as the broker takes no larger message; ask for less output, or \
                 have its max_message_size raised"
            ));
            self.cut_to(room, Size { others: size.others + 512, ..size });
        } else if size.all() > room {
            self.cut_to(room, size);
        }
        to_json(&self, size.all().min(room))
    }

    /// A result that was encoded before in at most `largest` bytes. None if it has no smaller form.
    pub fn shrink(json: &[u8], largest: usize) -> Option<Vec<u8>> {
        let reply: Self = serde_json::from_slice(json).ok()?;
        let smaller = reply.encode_for(usize::MAX, largest);
        (smaller.len() < json.len()).then_some(smaller)
    }

    /// Without a look at every character: none takes more than six bytes.
    fn surely_fits(&self, max_bytes: usize) -> bool {
        /// What is not a stream or an artifact: 4 KiB of metadata, and what else is bounded by a few KiB.
        const OTHERS: usize = 128 << 10;
        let streams = self.stdout.len().saturating_add(self.stderr.len()).saturating_mul(6);
        let artifacts =
            self.artifacts.iter().map(|artifact| artifact.base64.len() + 6 * artifact.path.len() + 64);
        streams.saturating_add(artifacts.sum()).saturating_add(OTHERS) <= max_bytes
    }

    fn cut_to(&mut self, max_bytes: usize, size: Size) {
        let mut excess = size.all().saturating_sub(max_bytes);
        if !self.artifacts.is_empty() {
            excess = drop_artifacts(self, excess, max_bytes);
        }
        if excess == 0 {
            return;
        }
        let room = cut_streams(self, max_bytes, size);
        if room == 0 && count(self) > max_bytes {
            self.metadata = None;
            self.blocked_syscalls.clear();
            self.error = self.error.take().map(|error| error.chars().take(200).collect());
        }
    }

    /// Adds a sentence to what a person is told.
    fn note(&mut self, note: &str) {
        self.error = Some(match self.error.take() {
            Some(error) => format!("{error}; {note}"),
            None => note.to_owned(),
        });
    }
}

/// What a result takes as JSON.
#[derive(Clone, Copy)]
struct Size {
    stdout: usize,
    stderr: usize,
    others: usize,
}

impl Size {
    fn of(reply: &mut Reply) -> Self {
        let (stdout, stderr) = (std::mem::take(&mut reply.stdout), std::mem::take(&mut reply.stderr));
        let size = Self { stdout: json_len(&stdout), stderr: json_len(&stderr), others: count(reply) };
        (reply.stdout, reply.stderr) = (stdout, stderr);
        size
    }

    fn all(self) -> usize {
        self.stdout + self.stderr + self.others
    }
}

fn to_json(reply: &Reply, size: usize) -> Vec<u8> {
    let mut json = Vec::with_capacity(size);
    // Strings, numbers and maps with string keys always encode; writing into memory does not fail.
    let _ = serde_json::to_writer(&mut json, reply);
    json
}

/// How many bytes it takes as JSON. What is large and needs no escapes is counted and not written.
fn count(reply: &mut Reply) -> usize {
    let artifacts = std::mem::take(&mut reply.artifacts);
    let mut size = to_json(reply, 1 << 10).len();
    for artifact in &artifacts {
        let bare =
            ReplyArtifact { base64: String::new(), path: artifact.path.clone(), bytes: artifact.bytes };
        // With the comma before the next one.
        size += serde_json::to_vec(&bare).unwrap_or_default().len() + artifact.base64.len() + 1;
    }
    reply.artifacts = artifacts;
    size.saturating_sub(usize::from(!reply.artifacts.is_empty()))
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
    reply.note(&note);
    excess
}

/// Cuts the streams to what room the other fields leave, and returns that.
fn cut_streams(reply: &mut Reply, max_bytes: usize, size: Size) -> usize {
    let (stdout, stderr) = (std::mem::take(&mut reply.stdout), std::mem::take(&mut reply.stderr));
    // Counted anew: artifacts may have gone.
    let room = max_bytes.saturating_sub(count(reply));
    let (out_len, err_len) = (size.stdout, size.stderr);
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
    room
}

/// The longest front of `text` that takes at most `room` bytes in JSON and is still whole in its encoding.
fn cut(mut text: String, room: usize, encoding: Encoding, truncated: bool) -> (String, bool) {
    let mut left = room;
    let fits = text.bytes().position(|byte| match left.checked_sub(byte_len(byte)) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    });
    let Some(end) = fits else { return (text, truncated) };
    text.truncate(match encoding {
        Encoding::Utf8 => text.floor_char_boundary(end),
        // Four characters carry three bytes.
        Encoding::Base64 => end - end % 4,
    });
    (text, true)
}

fn json_len(text: &str) -> usize {
    text.bytes().map(byte_len).sum()
}

/// What a byte takes inside a JSON string, as serde_json writes it. Those of longer characters are written as they are.
fn byte_len(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | b'\x08' | b'\x0c' | b'\n' | b'\r' | b'\t' => 2,
        b'\0'..=b'\x1f' => 6,
        _ => 1,
    }
}
