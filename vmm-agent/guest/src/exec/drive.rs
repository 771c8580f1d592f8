//! The task of a session: moves its output into the ring, its input out of the queue, ends it when its time is over, and
//! notes its end when it has come.

use std::{io, sync::Arc, time::Duration};

use oc_proto::v1::ExecStream;
use prost::bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    sync::watch,
    task::yield_now,
    time::{Instant, sleep_until, timeout},
};

use super::{launch::Channels, session::Session, terminal::Terminal};
use crate::children::Process;

/// After a process has ended, what it left running may hold its output open; it is not waited for longer than this while
/// nothing comes.
const LINGER: Duration = Duration::from_millis(200);
/// What is read at once, bytes: at first, and from a program that writes a lot. Never more than its ring takes.
const READ: (usize, usize) = (4 << 10, 256 << 10);
/// Reads that are smaller are copied, so that they do not hold on to a large buffer.
const COPIED: usize = 4 << 10;
/// What is read after the leader has ended, bytes: more than a pipe holds (pipe(7)), and an end to what others write.
const LEFT: usize = 1 << 20;

/// When a session is ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// So long after its start.
    pub time: Option<Duration>,
    /// So long after the last client has gone.
    pub alone: Option<Duration>,
    /// What its leader leaves running in its process group ends with it.
    pub leaves_nothing: bool,
}

/// Drives a session to its end.
pub async fn drive(session: Arc<Session>, mut process: Process, channels: Channels, limits: Limits) {
    let (leader_ended, ended) = watch::channel(false);
    let mut moving = std::pin::pin!(move_bytes(&session, channels, ended));
    let mut limit = std::pin::pin!(over(&session, limits));
    let mut is_drained = false;
    let mut is_over = None;
    let code = loop {
        tokio::select! {
            code = process.exit() => break code,
            () = &mut moving, if !is_drained => is_drained = true,
            over = &mut limit, if is_over.is_none() => {
                process.kill_group();
                is_over = Some(over);
            }
        }
    };
    leader_ended.send_replace(true);
    if limits.leaves_nothing {
        process.kill_rest();
    }
    if !is_drained {
        moving.await;
    }
    match is_over {
        Some(Over::Time(limit)) => {
            let line = format!("oc: killed after the timeout of {} s\n", limit.as_secs());
            session.put(ExecStream::Stderr, line.into()).await;
            session.end(-1, true);
        }
        Some(Over::Alone) | None => session.end(code, false),
    }
}

/// Why a session is ended.
enum Over {
    Time(Duration),
    Alone,
}

async fn over(session: &Session, limits: Limits) -> Over {
    let begun = Instant::now();
    let time = async {
        match limits.time {
            Some(limit) => {
                sleep_until(begun + limit).await;
                Over::Time(limit)
            }
            None => std::future::pending().await,
        }
    };
    let alone = async {
        match limits.alone {
            Some(limit) => alone_for(session, limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        over = time => over,
        () = alone => Over::Alone,
    }
}

/// Waits until nobody has been connected for that long.
async fn alone_for(session: &Session, limit: Duration) {
    loop {
        let mut taken = std::pin::pin!(session.taken());
        taken.as_mut().enable();
        let alone_since = session.lock().attachments.alone_since();
        match alone_since.map(|since| since + limit) {
            Some(until) if until <= Instant::now() => return,
            Some(until) => {
                let _ = tokio::time::timeout_at(until, taken).await;
            }
            None => taken.await,
        }
    }
}

/// Moves output and input until all of the output has come.
async fn move_bytes(session: &Session, channels: Channels, ended: watch::Receiver<bool>) {
    match channels {
        Channels::Pipes { stdin, stdout, stderr } => {
            let feeding = async {
                match stdin {
                    Some(stdin) => session.stdin().feed_pipe(stdin).await,
                    None => session.stdin().close(),
                }
                std::future::pending::<()>().await;
            };
            let out = read_all(session, ExecStream::Stdout, Source::Pipe(stdout), ended.clone());
            let err = read_all(session, ExecStream::Stderr, Source::Pipe(stderr), ended);
            tokio::select! { _ = async { tokio::join!(out, err) } => {}, () = feeding => {} }
        }
        Channels::Terminal(terminal) => {
            let feeding = async {
                session.stdin().feed_terminal(&terminal).await;
                std::future::pending::<()>().await;
            };
            let reading = read_all(session, ExecStream::Stdout, Source::Terminal(&terminal), ended);
            tokio::select! { () = reading => {}, () = feeding => {} }
        }
    }
}

enum Source<'a> {
    Pipe(pipe::Receiver),
    Terminal(&'a Terminal),
}

impl Source<'_> {
    /// Reads into the room that `buffer` is given, `most` bytes; 0 at the end.
    async fn read(&mut self, buffer: &mut BytesMut, most: usize) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => {
                buffer.reserve(most);
                pipe.read_buf(&mut buffer.limit(most)).await
            }
            Self::Terminal(terminal) => {
                buffer.resize(most, 0);
                let read = terminal.read(buffer).await;
                buffer.truncate(*read.as_ref().unwrap_or(&0));
                read
            }
        }
    }
}

/// Reads until nobody can write any more; once the leader has ended until nothing comes for a while.
async fn read_all(
    session: &Session,
    stream: ExecStream,
    mut source: Source<'_>,
    mut ended: watch::Receiver<bool>,
) {
    let mut buffer = BytesMut::new();
    let mut size = READ.0.min(session.room());
    let mut left = LEFT;
    loop {
        buffer.clear();
        let is_over = *ended.borrow();
        let read = source.read(&mut buffer, size);
        let read = if is_over {
            timeout(LINGER, read).await.unwrap_or(Ok(0))
        } else {
            tokio::select! {
                read = read => read,
                // What was not read yet is read then.
                _ = ended.changed() => continue,
            }
        };
        let Ok(read @ 1..) = read else { return };
        if is_over {
            if left == 0 {
                return;
            }
            left = left.saturating_sub(read);
        }
        let bytes = if read <= COPIED { Bytes::copy_from_slice(&buffer) } else { buffer.split().freeze() };
        session.put(stream, bytes).await;
        if read == size {
            size = (2 * size).min(READ.1).min(session.room());
            // The pipe may be full again by now, and would be whenever it is looked at: everybody else's turn comes first.
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            launch::{Invocation, Wanted, What},
            session::{Facts, Read},
            terminal::Size,
        },
        *,
    };
    use oc_proto::v1::{ExecKind, TerminalSize};

    /// A session of a script, as whoever runs this test.
    fn start(script: &str, size: Option<(u32, u32)>, ring_bytes: usize, limits: Limits) -> Arc<Session> {
        crate::children::reap_in_tests();
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).unwrap().unwrap();
        let invocation = Invocation {
            program: What::Script(script.into()),
            envs: [("A".to_owned(), "b".to_owned())].into(),
            cwd: "/".into(),
            user: user.name,
        };
        let size = size.map(|(cols, rows)| Size::parse(TerminalSize { cols, rows }).unwrap());
        let wanted = size.map_or(Wanted::Pipes { stdin: true }, Wanted::Terminal);
        let (process, channels) = invocation.launch([].into(), wanted).unwrap();
        let facts = Facts {
            id: "s".into(),
            kind: ExecKind::Command,
            command: script.into(),
            args: Vec::new(),
            started_at: std::time::SystemTime::now(),
            ring_bytes,
        };
        let session = Session::new(facts, process.group(), channels.terminal().zip(size));
        tokio::spawn(drive(Arc::clone(&session), process, channels, limits));
        session
    }

    /// All that is kept of it, by stream, once it has ended.
    async fn result(session: &Session) -> (i32, String, String) {
        let ended = timeout(Duration::from_secs(20), session.ended()).await.unwrap();
        let text = |stream| String::from_utf8(session.lock().ring.of_stream(stream).to_vec()).unwrap();
        (ended.exit_code, text(ExecStream::Stdout), text(ExecStream::Stderr))
    }

    #[tokio::test]
    async fn a_session_has_its_input_and_its_output_and_its_end() {
        let session = start("cat; echo $A; echo err >&2; exit 3", None, 1 << 20, Limits::default());
        session.write("in\n".into()).await.unwrap();
        session.stdin().end();
        assert_eq!(result(&session).await, (3, "in\nb\n".into(), "err\n".into()));
        assert!(session.write("more".into()).await.is_err());
        assert!(matches!(session.read(0, 10), Read::Piece(_)));
        assert!(matches!(session.read(9, 10), Read::End(_, 9)));
    }

    #[tokio::test]
    async fn a_session_that_leaves_nothing_ends_with_all_it_has_started() {
        let limits = Limits { leaves_nothing: true, ..Limits::default() };
        let session = start("sleep 1000 & echo $!; kill -9 $$", None, 1 << 20, limits);
        let (code, pid, _) = result(&session).await;
        assert_eq!(code, 137);
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        let is_gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            // Whoever inherits it may let it stand as a zombie.
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        timeout(Duration::from_secs(20), async {
            while !is_gone() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn what_a_command_leaves_running_does_not_keep_its_session() {
        let session = start("sleep 1000 & echo $!", None, 1 << 20, Limits::default());
        let (code, pid, _) = result(&session).await;
        assert_eq!(code, 0);
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        // One that never stops writing neither.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let line = "y".repeat(1000);
        let script = format!("(while :; do echo {line}; done) & echo $! > {}", file.display());
        result(&start(&script, None, 1 << 16, Limits::default())).await;
        let pid = std::fs::read_to_string(file).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        // It may have noticed already that nobody reads.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }

    #[tokio::test]
    async fn a_session_ends_when_its_time_is_over_or_nobody_is_left() {
        // However long the shell takes to come as far as its first line.
        let mut time = Duration::from_millis(50);
        loop {
            let limits = Limits { time: Some(time), ..Limits::default() };
            let (code, out, err) = result(&start("echo out; sleep 1000", None, 1 << 20, limits)).await;
            assert_eq!(code, -1);
            assert!(err.contains("timeout"), "{err}");
            if out == "out\n" {
                break;
            }
            assert_eq!(out, "");
            time *= 2;
            assert!(time < Duration::from_secs(15), "a shell that says nothing");
        }
        let limits = Limits { alone: Some(Duration::from_millis(50)), ..Limits::default() };
        assert_eq!(result(&start("sleep 1000", None, 1 << 20, limits)).await.0, 137);
    }

    #[tokio::test]
    async fn a_terminal_is_the_shells_own_and_has_its_size() {
        let session = start(
            "tty >/dev/null && stty size && echo $TERM; read line; echo got $line; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.05; done",
            Some((101, 33)),
            1 << 20,
            Limits::default(),
        );
        let shown = async |wanted: &str| {
            timeout(Duration::from_secs(20), async {
                loop {
                    let mut written = std::pin::pin!(session.written());
                    written.as_mut().enable();
                    let all = session.lock().ring.of_stream(ExecStream::Stdout);
                    if String::from_utf8_lossy(&all).contains(wanted) {
                        return;
                    }
                    written.await;
                }
            })
            .await
            .unwrap();
        };
        shown("33 101\r\nxterm-256color\r\n").await;
        // Not before, as its echo would be amid that.
        session.write("typed\n".into()).await.unwrap();
        shown("got typed\r\n").await;
        shown("ready").await;
        session.resize(Size::parse(TerminalSize { cols: 77, rows: 22 }).unwrap()).unwrap();
        let (code, out, _) = result(&session).await;
        assert_eq!(code, 5);
        assert!(out.contains("22 77\r\n"), "{out}");
        assert!(session.resize(Size::parse(TerminalSize { cols: 7, rows: 2 }).unwrap()).is_err());
    }

    #[tokio::test]
    async fn a_session_waits_for_its_reader_and_for_nobody_else() {
        use super::super::attachments::Terms;
        let script = "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done";
        let all: String = (0..2000).map(|n| format!("{n}\n")).collect();
        let session = start(script, None, 4000, Limits::default());
        let reader = session.lock().attachments.attach(Terms::default(), 0).unwrap();
        let mut read = Vec::new();
        loop {
            let mut written = std::pin::pin!(session.written());
            written.as_mut().enable();
            match session.read(read.len() as u64, 100) {
                Read::Piece(piece) => {
                    assert_eq!(piece.offset, read.len() as u64, "something was dropped");
                    read.extend_from_slice(&piece.bytes);
                    session.lock().attachments.sent(reader, read.len() as u64);
                    session.tell_taken();
                }
                Read::End(..) => break,
                Read::Nothing => timeout(Duration::from_secs(20), written).await.unwrap(),
            }
        }
        assert!(read == all.as_bytes());
        let alone = start(script, None, 4000, Limits::default());
        let (_, out, _) = result(&alone).await;
        assert!(out.len() <= 4000 && all.ends_with(&out), "{} bytes", out.len());
        assert_eq!(alone.lock().ring.end(), all.len() as u64);
    }

    #[tokio::test]
    async fn no_piece_is_larger_than_its_ring() {
        for ring_bytes in [4000, 50_000] {
            // All in one write, so that as much as is asked for can be read at once.
            let script = "head -c 200000 /dev/zero | dd bs=200000 iflag=fullblock status=none";
            let session = start(script, None, ring_bytes, Limits::default());
            let (_, out, _) = result(&session).await;
            assert!((1..=ring_bytes).contains(&out.len()), "{} bytes", out.len());
            assert_eq!(session.lock().ring.end(), 200_000);
        }
    }
}
