//! Sessions that are no processes: programs of a few lines, with a log that is kept whole.

use std::collections::BTreeMap;

use oc_proto::v1::{ExecKind, ExecSession, ExecStream, TerminalSize};

/// A session.
#[derive(Default)]
pub struct Session {
    pub id: String,
    pub words: Vec<String>,
    pub kind: ExecKind,
    pub terminal: Option<TerminalSize>,
    /// All output, and where each stretch of it was written to.
    pub log: Vec<u8>,
    stretches: Vec<(usize, ExecStream)>,
    /// The oldest bytes, which are kept no longer.
    pub dropped: usize,
    /// Exit code, and whether the timeout ended it.
    pub exit: Option<(i32, bool)>,
    pub stdin: Vec<u8>,
    pub stdin_ends: usize,
    /// What of its input has come, by the name of the attachment.
    pub accepted: BTreeMap<String, u64>,
    pub acknowledged: u64,
    pub signals: Vec<i32>,
    pub sizes: Vec<(u32, u32)>,
    pub detached: usize,
    /// The sandbox hibernates under it.
    pub hibernates: bool,
    line: Vec<u8>,
}

/// Bytes that repeat only late.
pub fn noise(count: usize) -> Vec<u8> {
    (0..u32::try_from(count).unwrap())
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0])
        .collect()
}

impl Session {
    /// Starts a program, or a script of one command.
    pub fn start(id: &str, cmd: &str, args: &[String], terminal: Option<TerminalSize>) -> Self {
        let words = match args {
            [flag, script] if cmd == "/bin/sh" && flag == "-c" => {
                script.split_whitespace().map(ToOwned::to_owned).collect()
            }
            _ => std::iter::once(cmd.to_owned()).chain(args.iter().cloned()).collect(),
        };
        let kind = if terminal.is_some() { ExecKind::Terminal } else { ExecKind::Command };
        let mut session = Self { id: id.to_owned(), words, kind, terminal, ..Self::default() };
        session.begin();
        session
    }

    fn word(&self, index: usize) -> &str {
        self.words.get(index).map_or("", String::as_str)
    }

    fn begin(&mut self) {
        match self.word(0) {
            "echo" => {
                let line = format!("{}\n", self.words[1..].join(" "));
                self.write(ExecStream::Stdout, line.as_bytes());
                self.end(0);
            }
            "bytes" => {
                self.write(ExecStream::Stdout, b"\xff\0out");
                self.write(ExecStream::Stderr, b"\xfeerr");
                self.end(0);
            }
            "exit" => self.end(self.word(1).parse().unwrap()),
            "gone" => {
                self.write(ExecStream::Stderr, b"sh: 1: gone: not found\n");
                self.end(127);
            }
            "sleep" => self.exit = Some((-1, true)),
            "much" => {
                self.write(ExecStream::Stdout, &[b'x'; 99]);
                self.write(ExecStream::Stdout, b"end");
                self.dropped = 99;
                self.end(0);
            }
            "flood" => {
                for (index, part) in noise(self.word(1).parse().unwrap()).chunks(10_007).enumerate() {
                    let stream = if index % 3 == 2 { ExecStream::Stderr } else { ExecStream::Stdout };
                    self.write(stream, part);
                }
                self.end(7);
            }
            "hibernates" => {
                self.write(ExecStream::Stdout, b"before\n");
                self.hibernates = true;
            }
            "shell" => self.write(ExecStream::Stdout, b"$ "),
            // These wait for something.
            _ => {}
        }
    }

    /// Takes input.
    pub fn take(&mut self, bytes: &[u8]) {
        self.stdin.extend(bytes);
        match self.word(0) {
            "cat" => self.write(ExecStream::Stdout, bytes),
            "shell" => bytes.iter().for_each(|&key| self.key(key)),
            _ => {}
        }
    }

    /// What a terminal and a shell on it do with a key.
    fn key(&mut self, key: u8) {
        if key != b'\r' {
            self.line.push(key);
            return self.write(ExecStream::Stdout, &[key]);
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        self.write(ExecStream::Stdout, b"\r\n");
        match line.split_once(' ') {
            Some(("exit", code)) => return self.end(code.parse().unwrap()),
            _ if line == "hibernate" => self.hibernates = true,
            _ => self.write(ExecStream::Stdout, format!("ran {line:?}\r\n").as_bytes()),
        }
        self.write(ExecStream::Stdout, b"$ ");
    }

    /// Its input has ended.
    pub fn take_end(&mut self) {
        self.stdin_ends += 1;
        match self.word(0) {
            "cat" => self.end(0),
            "count" if self.exit.is_none() => {
                let line = format!("{}\n", self.stdin.len());
                self.write(ExecStream::Stdout, line.as_bytes());
                self.end(0);
            }
            _ => {}
        }
    }

    /// Gets a signal.
    pub fn signal(&mut self, signal: i32) {
        self.signals.push(signal);
        if self.exit.is_none() && (self.word(0) != "stubborn" || signal == 9) {
            self.end(128 + signal);
        }
    }

    /// Its terminal has another size.
    pub fn resize(&mut self, size: TerminalSize) {
        self.sizes.push((size.cols, size.rows));
        if self.terminal.replace(size) != Some(size) && self.word(0) == "shell" {
            self.write(ExecStream::Stdout, format!("[{}x{}]", size.cols, size.rows).as_bytes());
        }
    }

    pub fn write(&mut self, stream: ExecStream, bytes: &[u8]) {
        if self.stretches.last().is_none_or(|(_, last)| *last != stream) {
            self.stretches.push((self.log.len(), stream));
        }
        self.log.extend(bytes);
    }

    pub fn end(&mut self, code: i32) {
        self.exit = Some((code, false));
    }

    /// Output from `offset` on, as much as a message holds.
    pub fn output(&self, offset: usize, most: usize) -> Option<(ExecStream, Vec<u8>)> {
        let next = self.stretches.partition_point(|(start, _)| *start <= offset);
        let (_, stream) = self.stretches.get(next.checked_sub(1)?)?;
        let end = self.stretches.get(next).map_or(self.log.len(), |(start, _)| *start);
        let end = end.min(offset + most.min(256 << 10));
        (end > offset).then(|| (*stream, self.log[offset..end].to_vec()))
    }

    /// What was written to one stream.
    pub fn written(&self, stream: ExecStream) -> Vec<u8> {
        let mut written = Vec::new();
        let mut offset = self.dropped;
        while let Some((to, bytes)) = self.output(offset, usize::MAX / 2) {
            offset += bytes.len();
            if to == stream {
                written.extend(bytes);
            }
        }
        written
    }

    pub fn describe(&self) -> ExecSession {
        ExecSession {
            session_id: self.id.clone(),
            sandbox_id: "sb-1".into(),
            command: self.words[0].clone(),
            args: self.words[1..].to_vec(),
            running: self.exit.is_none(),
            exit_code: self.exit.map(|(code, _)| code),
            timed_out: self.exit.is_some_and(|(_, timed_out)| timed_out),
            kind: self.kind.into(),
            terminal: self.terminal,
            output_bytes: self.log.len() as u64,
            dropped_bytes: self.dropped as u64,
            ..ExecSession::default()
        }
    }
}
