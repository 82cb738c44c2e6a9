//! The pipes between the worker and a job: what comes out is counted as it is read, what goes in never blocks.
//!
//! A job writes line by line, as on a terminal. To be woken for each of them would cost the worker as much as they
//! cost the job, and the kernel wakes whoever waits for a pipe at each write. So a pipe that something has come out
//! of is left alone for a few milliseconds, without anything waiting for it, and then read; only one that was found
//! empty is waited for. How long it is left alone goes by how fast it fills: a job is not to find it full.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::job::{Captured, Stream};
use crate::sandbox::supervise::live_output::Tap;
use crate::sys::{fd, ready};

/// Bytes taken in one read: a pipe's own size.
const CHUNK: usize = 64 << 10;
/// In the first one. Most jobs write less, and room that is not needed has to be cleared all the same.
const FIRST_CHUNK: usize = 4 << 10;
/// A pipe is left alone until about so much is in it, by how fast it filled the last time.
const FILLED: usize = CHUNK / 4;
/// But no longer than this.
const PAUSE_MAX: Duration = Duration::from_millis(5);
/// The least that a timer can do.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// From the beginning of a job. Most are over by then, and what is in the pipe is read at their end.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
/// From the beginning of a process. Few say anything before their job begins.
const START_PAUSE: Duration = Duration::from_millis(20);

/// One stream of output, up to a limit. Past that nothing more is read: a flood costs a fixed amount of memory.
#[derive(Debug)]
pub(in crate::sandbox) struct Output {
    pipe: Pipe,
    bytes: Vec<u8>,
    state: State,
    tap: Option<(Tap, Stream)>,
    /// When it was read, or may have begun to fill.
    since: Instant,
}

#[derive(Debug)]
enum Pipe {
    /// To be read at this time; nothing waits for it.
    LeftAlone(File, Instant),
    /// It was empty.
    Awaited(AsyncFd<File>),
    /// Nothing can be read from it.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Over,
}

impl Output {
    pub(in crate::sandbox) fn new(pipe: OwnedFd) -> io::Result<Self> {
        fd::set_nonblocking(&pipe)?;
        let since = Instant::now();
        let pipe = Pipe::LeftAlone(File::from(pipe), since + START_PAUSE);
        Ok(Self { pipe, bytes: Vec::new(), state: State::Open, tap: None, since })
    }

    /// The job begins. From now on whoever holds the tap sees the output as it is read, and first what came before.
    pub(in crate::sandbox) fn begin(&mut self, tap: Option<Tap>, stream: Stream) {
        self.tap = tap.map(|tap| (tap, stream));
        self.show(0);
        self.since = Instant::now();
        if let Pipe::LeftAlone(_, until) = &mut self.pipe {
            *until = self.since + FIRST_PAUSE;
        }
    }

    /// There may be more to come.
    pub(in crate::sandbox) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// More was written than the limit allows.
    pub(in crate::sandbox) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Waits for output, and takes it. Nothing is lost if it is dropped while it waits.
    pub(in crate::sandbox) async fn fill(&mut self, limit: u64) {
        let held = self.bytes.len();
        let read = match &self.pipe {
            Pipe::LeftAlone(pipe, until) => {
                sleep_until(*until).await;
                take(pipe, &mut self.bytes, limit)
            }
            Pipe::Awaited(pipe) => match pipe.readable().await {
                Ok(mut ready) => {
                    let read = take(ready.get_inner(), &mut self.bytes, limit);
                    if is_empty(&read) {
                        ready.clear_ready();
                    }
                    read
                }
                Err(error) => Err(error),
            },
            Pipe::Lost => Ok(State::Ended),
        };
        if is_empty(&read) {
            self.wait_for_it();
        } else {
            self.state = read.unwrap_or(State::Ended);
            self.pause(self.bytes.len() - held);
        }
        self.show(held);
    }

    fn wait_for_it(&mut self) {
        self.pipe = match std::mem::replace(&mut self.pipe, Pipe::Lost) {
            Pipe::LeftAlone(pipe, _) => ready::readable(pipe).map_or(Pipe::Lost, Pipe::Awaited),
            other => other,
        };
    }

    /// After so many bytes: a pipe that fills fast is read again at once, any other is left alone for a while.
    fn pause(&mut self, bytes: usize) {
        let now = Instant::now();
        let filling = now - std::mem::replace(&mut self.since, now);
        let share = u32::try_from(FILLED / bytes.max(1)).unwrap_or(u32::MAX);
        let pause = filling.saturating_mul(share).clamp(Duration::ZERO, PAUSE_MAX);
        let is_slow = bytes < FILLED && pause >= PAUSE_MIN;
        self.pipe = match std::mem::replace(&mut self.pipe, Pipe::Lost) {
            Pipe::Awaited(pipe) if is_slow => Pipe::LeftAlone(pipe.into_inner(), now + pause),
            Pipe::LeftAlone(pipe, _) => Pipe::LeftAlone(pipe, if is_slow { now + pause } else { now }),
            other => other,
        };
    }

    /// Passes on what came after the first `held` bytes.
    fn show(&self, held: usize) {
        if let Some((tap, stream)) = &self.tap {
            tap.add(*stream, &self.bytes[held..]);
        }
    }

    /// Takes what is left once every writer is dead.
    pub(in crate::sandbox) fn finish(&mut self, limit: u64) -> Captured {
        let held = self.bytes.len();
        while self.state == State::Open {
            let read = match &self.pipe {
                Pipe::LeftAlone(pipe, _) => take(pipe, &mut self.bytes, limit),
                Pipe::Awaited(pipe) => take(pipe.get_ref(), &mut self.bytes, limit),
                Pipe::Lost => Ok(State::Ended),
            };
            self.state = read.unwrap_or(State::Ended);
        }
        self.show(held);
        Captured { bytes: std::mem::take(&mut self.bytes), truncated: self.state == State::Over }
    }
}

fn is_empty(read: &io::Result<State>) -> bool {
    read.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// One read. The byte after the limit is what tells "exactly" from "more".
fn take(mut pipe: &File, bytes: &mut Vec<u8>, limit: u64) -> io::Result<State> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let held = bytes.len();
    let chunk = if held == 0 { FIRST_CHUNK } else { CHUNK };
    let room = limit.saturating_sub(held).saturating_add(1).min(chunk);
    bytes.resize(held + room, 0);
    let read = loop {
        match pipe.read(&mut bytes[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    bytes.truncate(held + *read.as_ref().unwrap_or(&0));
    if read? == 0 {
        return Ok(State::Ended);
    }
    if bytes.len() > limit {
        bytes.truncate(limit);
        return Ok(State::Over);
    }
    Ok(State::Open)
}

/// Bytes on their way into a job. Whoever does not read them, or has closed the other end, ends it quietly.
#[derive(Debug)]
pub(in crate::sandbox) struct Input {
    pipe: Option<AsyncFd<File>>,
    bytes: Vec<u8>,
    sent: usize,
}

impl Input {
    /// Sends at once what fits, which is all of it in most cases.
    pub(in crate::sandbox) fn new(pipe: OwnedFd, bytes: Vec<u8>) -> io::Result<Self> {
        fd::set_nonblocking(&pipe)?;
        let (pipe, mut sent) = (File::from(pipe), 0);
        if push(&pipe, &bytes, &mut sent) {
            return Ok(Self { pipe: None, bytes: Vec::new(), sent });
        }
        Ok(Self { pipe: Some(ready::writable(pipe)?), bytes, sent })
    }

    /// There is more to send.
    pub(in crate::sandbox) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Waits for room, and sends what fits; the pipe is closed behind the last byte.
    pub(in crate::sandbox) async fn send(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let done = match pipe.writable().await {
            Ok(mut ready) => {
                let done = push(ready.get_inner(), &self.bytes, &mut self.sent);
                if !done {
                    ready.clear_ready();
                }
                done
            }
            Err(_) => true,
        };
        if done {
            self.pipe = None;
            self.bytes = Vec::new();
        }
    }
}

/// Writes until there is no room. True where nothing is left to do: all is sent, or nobody reads it.
fn push(mut pipe: &File, bytes: &[u8], sent: &mut usize) -> bool {
    while *sent < bytes.len() {
        match pipe.write(&bytes[*sent..]) {
            Ok(more) => *sent += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    async fn captured(written: usize, limit: u64) -> Captured {
        let (read, write) = fd::pipe().unwrap();
        let mut output = Output::new(read).unwrap();
        let writer = std::thread::spawn(move || {
            // The reader stops at the limit, and then the pipe breaks.
            let _ = File::from(write).write_all(&vec![b'x'; written]);
        });
        while output.is_open() {
            output.fill(limit).await;
        }
        let captured = output.finish(limit);
        writer.join().unwrap();
        captured
    }

    #[tokio::test]
    async fn exactly_the_limit_is_no_overflow() {
        for limit in [0, 1, 100, 65_536, 200_000] {
            let size = usize::try_from(limit).unwrap();
            assert_eq!(captured(size, limit).await, Captured { bytes: vec![b'x'; size], truncated: false });
            let over = captured(size + 1, limit).await;
            assert_eq!((over.bytes.len(), over.truncated), (size, true));
        }
    }

    /// Reads what `write` writes, a line at a time, and counts how often it was there to be read.
    async fn reads(lines: usize, apart: Duration) -> (usize, usize) {
        let (read, write) = fd::pipe().unwrap();
        let mut output = Output::new(read).unwrap();
        output.begin(None, Stream::Stdout);
        let writer = std::thread::spawn(move || {
            let mut write = File::from(write);
            for _ in 0..lines {
                write.write_all(b"a line\n").unwrap();
                let next = std::time::Instant::now() + apart;
                while std::time::Instant::now() < next {
                    std::thread::yield_now();
                }
            }
        });
        let mut reads = 0;
        while output.is_open() {
            output.fill(u64::MAX >> 1).await;
            reads += 1;
        }
        writer.join().unwrap();
        (reads, output.finish(u64::MAX >> 1).bytes.len())
    }

    #[tokio::test]
    async fn many_lines_are_read_together() {
        let (all, bytes) = reads(2_000, Duration::from_micros(50)).await;
        assert_eq!(bytes, 14_000);
        // Some 0.2 s of lines, in pauses of 5 ms.
        assert!(all < 400, "{all} reads");
        // One in 20 ms is there at once, and the pipe is empty afterwards.
        let (few, bytes) = reads(10, Duration::from_millis(20)).await;
        assert!(bytes == 70 && (10..40).contains(&few), "{few} reads");
    }

    #[tokio::test]
    async fn a_pipe_that_fills_fast_is_emptied_fast() {
        let begun = std::time::Instant::now();
        assert_eq!(captured(128 << 20, 128 << 20).await.bytes.len(), 128 << 20);
        // With a pause for each time that it was full there would be 2,048 of them, 10 s together. Without, it takes some
        // tenths of a second.
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn input_that_nobody_reads_ends() {
        let (read, write) = fd::pipe().unwrap();
        let mut input = Input::new(write, vec![0; 1 << 20]).unwrap();
        drop(read);
        while input.is_open() {
            input.send().await;
        }
    }
}
