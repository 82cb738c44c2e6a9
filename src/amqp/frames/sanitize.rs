//! The words of strangers in a frame, made into what lapin can read.
//!
//! Bytes that are not UTF-8 become [`SUBSTITUTE`]; tables and lists that are nested too deep become a string of bytes,
//! which are written alike. No length changes. None where a payload is not what it should be.
//!
//! When this can be removed stands in [`filter`](super::filter); `filter/properties.rs` holds that lapin's parser can read
//! all that comes out, and refuses what is given up here.

use std::ops::Range;

/// Stands for a byte that was not UTF-8: the character that ASCII has for this.
pub(in crate::amqp) const SUBSTITUTE: char = '\u{1a}';

/// Headers in headers, so many times; what is deeper is left as bytes.
pub(in crate::amqp) const DEPTH: usize = 16;

/// The methods that carry words of a stranger: routing keys, and the broker's complaints, which quote names and are
/// cut to 255 bytes wherever that falls.
pub(in crate::amqp) fn method(payload: &mut [u8]) -> Option<()> {
    let mut cursor = Cursor(payload);
    match (cursor.u16()?, cursor.u16()?) {
        // connection.close, channel.close: a code, the text.
        (10, 50) | (20, 40) => {
            cursor.u16()?;
            cursor.short()
        }
        // basic.return: a code, the text, exchange, routing key.
        (60, 50) => {
            cursor.u16()?;
            (0..3).try_for_each(|_| cursor.short())
        }
        // basic.deliver: consumer, number, redelivered, exchange, routing key.
        (60, 60) => {
            cursor.short()?;
            cursor.skip(9)?;
            (0..2).try_for_each(|_| cursor.short())
        }
        // basic.get-ok: number, redelivered, exchange, routing key.
        (60, 71) => {
            cursor.skip(9)?;
            (0..2).try_for_each(|_| cursor.short())
        }
        _ => Some(()),
    }
}

/// The properties of a message.
pub(in crate::amqp) fn header(payload: &mut [u8]) -> Option<()> {
    let mut cursor = Cursor(payload);
    // Class, weight, size of the body.
    cursor.skip(12)?;
    let flags = cursor.u16()?;
    for property in 0..14 {
        if flags & (0x8000 >> property) == 0 {
            continue;
        }
        match property {
            2 => cursor.table()?,
            // Delivery mode and priority; the timestamp.
            3 | 4 => cursor.skip(1)?,
            9 => cursor.skip(8)?,
            _ => cursor.short()?,
        }
    }
    Some(())
}

/// The number of the delivery that a method announces, if it announces one.
pub(in crate::amqp) fn delivered(payload: &[u8]) -> Option<u64> {
    let rest = payload.strip_prefix(&[0, 60, 0, 60])?;
    let consumer = usize::from(*rest.first()?);
    rest.get(1 + consumer..)?.first_chunk().copied().map(u64::from_be_bytes)
}

/// Where the headers stand among the properties of a message, and their length before them.
pub(in crate::amqp) fn headers(payload: &mut [u8]) -> Option<Range<usize>> {
    let all = payload.len();
    let mut cursor = Cursor(payload);
    cursor.skip(12)?;
    let flags = cursor.u16()?;
    for property in [0x8000, 0x4000] {
        if flags & property != 0 {
            cursor.short()?;
        }
    }
    if flags & 0x2000 == 0 {
        return None;
    }
    let from = all - cursor.0.len();
    cursor.long()?;
    Some(from..all - cursor.0.len())
}

/// The largest frame that the broker offers, where it offers anything: zero for no limit.
pub(in crate::amqp) fn tuned_frame_max(payload: &[u8]) -> Option<u32> {
    // connection.tune: channels, the size.
    let offer = payload.strip_prefix(&[0, 10, 0, 30])?.get(2..)?;
    offer.first_chunk().copied().map(u32::from_be_bytes)
}

/// What is left of a payload.
struct Cursor<'a>(&'a mut [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a mut [u8]> {
        let bytes = std::mem::take(&mut self.0);
        let (taken, left) = bytes.split_at_mut_checked(count)?;
        self.0 = left;
        Some(taken)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.take(count).map(drop)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.first_chunk().copied().map(u16::from_be_bytes)
    }

    /// What a length of 32 bits stands before.
    fn long(&mut self) -> Option<&'a mut [u8]> {
        let length = self.take(4)?.first_chunk().copied().map(u32::from_be_bytes)?;
        self.take(usize::try_from(length).ok()?)
    }

    fn short(&mut self) -> Option<()> {
        let length = self.take(1)?[0];
        self.take(length.into()).map(substitute)
    }

    /// The headers.
    fn table(&mut self) -> Option<()> {
        Cursor(self.long()?).fields(b'F', DEPTH)
    }

    /// Everything in a table, or in an array, which has no names.
    fn fields(mut self, kind: u8, depth: usize) -> Option<()> {
        while !self.0.is_empty() {
            if kind == b'F' {
                self.short()?;
            }
            self.value(depth)?;
        }
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        let kind = &mut self.take(1)?[0];
        let length = match *kind {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.long().map(drop),
            b'F' | b'A' if depth == 0 => {
                // Bytes are written like tables and arrays: a length, and so much of it.
                *kind = b'x';
                return self.long().map(drop);
            }
            kind @ (b'F' | b'A') => return Cursor(self.long()?).fields(kind, depth - 1),
            _ => return None,
        };
        self.skip(length)
    }
}

/// Replaces every byte that belongs to no character.
fn substitute(text: &mut [u8]) {
    let mut from = 0;
    while let Err(error) = std::str::from_utf8(&text[from..]) {
        let bad = from + error.valid_up_to();
        let end = error.error_len().map_or(text.len(), |length| bad + length);
        text[bad..end].fill(SUBSTITUTE as u8);
        from = end;
    }
}
