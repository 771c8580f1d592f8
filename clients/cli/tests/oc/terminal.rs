//! `oc shell` and `oc exec -it` on a real pseudo-terminal, against a mesh without microVMs.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{pty::openpty, sys::signal::Signal};
use oc_proto::v1::ExecStream;
use rustix::termios::{self, LocalModes, Winsize};

use crate::fake::{
    Fake,
    exec::{Break, How},
    shell::{Shell, signal, text},
};

/// A child on a terminal of its own.
struct Typist {
    child: Child,
    master: OwnedFd,
    /// Another way to the terminal, on which to look at how it is set.
    terminal: OwnedFd,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    begun: String,
}

fn window(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_col: cols, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Typist {
    fn new(shell: &Shell, line: &str) -> Self {
        let pty = openpty(None, None).unwrap();
        termios::tcsetwinsize(&pty.slave, window(100, 30)).unwrap();
        let begun = modes(&pty.slave);
        let oc = shell.command(line);
        // As a login does: a session of its own, whose controlling terminal this is.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(oc.get_program()).args(oc.get_args()).env_clear();
        command.envs(oc.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let path = std::env::var_os("PATH").unwrap();
        command.env("PATH", path).env("TERM", "vt220").current_dir(oc.get_current_dir().unwrap());
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        drop(command);
        let mut source = File::from(pty.master.try_clone().unwrap());
        let (tell, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error when the last of the other side is closed.
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                if tell.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, master: pty.master, terminal: pty.slave, shown, seen: Vec::new(), begun }
    }

    fn types(&mut self, keys: &[u8]) {
        File::from(self.master.try_clone().unwrap()).write_all(keys).unwrap();
    }

    /// Waits until this is shown, after what was waited for before.
    fn sees(&mut self, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let at = self.seen.windows(wanted.len()).position(|part| part == wanted.as_bytes());
            if let Some(at) = at {
                self.seen.drain(..at + wanted.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(more) => self.seen.extend(more),
                Err(_) => panic!("{wanted:?} is never shown, but {:?}", text(&self.seen)),
            }
        }
    }

    fn resizes(&self, cols: u16, rows: u16) {
        termios::tcsetwinsize(&self.master, window(cols, rows)).unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = termios::tcgetattr(&self.terminal).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for its end: the terminal is as it was.
    fn ends(&mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        assert_eq!(modes(&self.terminal), self.begun, "the terminal is not as it was");
        status
    }
}

fn modes(terminal: &OwnedFd) -> String {
    format!("{:?}", termios::tcgetattr(terminal).unwrap())
}

fn attached(mesh: &Fake, count: usize) {
    mesh.until("it is attached", |state| state.sessions.attached.len() == count);
}

#[test]
fn a_shell_is_typed_at_and_its_exit_code_is_ours() {
    let shell = Shell::new();
    let mut typist = Typist::new(&shell, "shell sb-1 --shell /bin/zsh --user root --env A=1");
    typist.sees("$ ");
    assert!(typist.is_raw());
    {
        let state = shell.mesh.state.lock().unwrap();
        let request = &state.sessions.terminals[0];
        assert_eq!((request.cols, request.rows), (100, 30));
        assert_eq!((request.shell.as_str(), request.user.as_str()), ("/bin/zsh", "root"));
        assert_eq!((request.envs["TERM"].as_str(), request.envs["A"].as_str()), ("vt220", "1"));
    }
    typist.types(b"ls\x03\r");
    // Nothing here echoes, cooks, or makes a signal of a key.
    typist.sees("ls\x03\r\nran \"ls\\u{3}\"\r\n$ ");
    typist.types(b"exit 7\r");
    assert_eq!(typist.ends().code(), Some(7));
}

#[test]
fn the_windows_size_is_followed() {
    let shell = Shell::new();
    let mut typist = Typist::new(&shell, "exec -it sb-1 -- shell");
    typist.sees("$ ");
    typist.resizes(120, 40);
    typist.sees("[120x40]");
    // Also by a connection that comes after one that broke.
    let at_once = Break { output: 3, input: usize::MAX, how: How::Unavailable };
    shell.mesh.state.lock().unwrap().sessions.breaks.push_back(at_once);
    typist.types(b"exit 0\r");
    assert!(typist.ends().success());
    shell.mesh.session("s1", |session| assert_eq!(session.sizes.last(), Some(&(120, 40))));
}

#[test]
fn keys_survive_a_connection_that_breaks() {
    let shell = Shell::new();
    let at = Break { output: usize::MAX, input: 3, how: How::BrokenPipe };
    shell.mesh.state.lock().unwrap().sessions.breaks.extend([at, at]);
    let mut typist = Typist::new(&shell, "shell sb-1");
    typist.sees("$ ");
    typist.types(b"abcdefg\r");
    typist.sees("ran \"abcdefg\"");
    typist.types(b"exit 0\r");
    assert!(typist.ends().success());
    shell.mesh.session("s1", |session| assert_eq!(session.stdin, b"abcdefg\rexit 0\r"));
}

#[test]
fn a_shell_that_is_left_can_be_come_back_to() {
    let shell = Shell::new();
    let mut typist = Typist::new(&shell, "shell sb-1");
    typist.sees("$ ");
    typist.types(b"a\x10");
    typist.types(b"\x11");
    typist.sees("come back with `oc shell sb-1 --attach s1`");
    assert_eq!(typist.ends().code(), Some(0));
    // It is left without an answer where that does not come soon.
    shell.mesh.until("it is told that we go", |state| state.sessions.all[0].detached == 1);
    shell.mesh.session("s1", |session| {
        assert_eq!(session.stdin, b"a");
        assert!(session.signals.is_empty());
    });
    let mut typist = Typist::new(&shell, "shell sb-1 --attach s1");
    typist.sees("$ a");
    typist.types(b"\r");
    typist.sees("ran \"a\"");
    typist.types(b"exit 5\r");
    assert_eq!(typist.ends().code(), Some(5));
}

#[test]
fn the_terminal_is_put_back_whatever_ends_us() {
    let shell = Shell::new();
    let mut typist = Typist::new(&shell, "shell sb-1");
    typist.sees("$ ");
    signal(&typist.child, Signal::SIGTERM);
    assert_eq!(typist.ends().code(), Some(143));
    shell.mesh.until("it is told", |state| state.sessions.all[0].signals == [15]);

    let mut typist = Typist::new(&shell, "exec -it sb-1 -- shell");
    typist.sees("$ ");
    typist.types(b"hibernate\r");
    typist.sees("oc exec attach sb-1 s2 -i --offset");
    assert_eq!(typist.ends().code(), Some(4));

    let mut typist = Typist::new(&shell, "exec -it sb-1 -- nothing x");
    typist.sees("COMMAND_NOT_FOUND");
    assert_eq!(typist.ends().code(), Some(127));
}

#[test]
fn a_terminal_that_is_closed_hangs_the_shell_up_unless_it_is_to_be_kept() {
    let shell = Shell::new();
    for (flag, signals, detached) in [("", vec![1], 0), (" --keep", vec![], 1)] {
        let mut typist = Typist::new(&shell, &format!("shell sb-1{flag}"));
        typist.sees("$ ");
        let Typist { mut child, master, terminal, shown, .. } = typist;
        let count = shell.mesh.state.lock().unwrap().sessions.all.len();
        drop((terminal, shown));
        // The reader holds the last way to it until it reads something.
        drop(master);
        signal(&child, Signal::SIGHUP);
        assert_eq!(child.wait().unwrap().code(), Some(129));
        shell.mesh.until(&format!("it is told{flag}"), |state| {
            let session = &state.sessions.all[count - 1];
            (&session.signals, session.detached) == (&signals, detached)
        });
    }
}

#[test]
fn output_that_never_ends_can_be_left() {
    let shell = Shell::new();
    let mut typist = Typist::new(&shell, "exec -it sb-1 -- waits");
    attached(&shell.mesh, 1);
    shell.mesh.session("s1", |session| session.write(ExecStream::Stdout, &[b'x'; 300_000]));
    typist.sees(&"x".repeat(1000));
    typist.types(b"\x10\x11");
    typist.sees("come back with `oc exec attach sb-1 s1 -i`");
    assert!(typist.ends().success());
}
