//! `oc exec`, as a shell runs it, against a mesh without microVMs whose connections break.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Output, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use oc_proto::v1::ExecStream;
use serde_json::Value;

use crate::fake::{
    exec::{Break, How},
    sessions::noise,
    shell::{Shell, signal, text},
};

/// Runs a command with something on its standard input.
fn feed(shell: &Shell, line: &str, input: Vec<u8>) -> Output {
    let mut child = shell
        .command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    // It is closed early if it is too much.
    let _ = writer.join().unwrap();
    output
}

/// Runs a command whose standard output is read as it comes.
fn spawn(shell: &Shell, line: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = shell.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

fn breaks(shell: &Shell, breaks: impl IntoIterator<Item = Break>) {
    shell.mesh.state.lock().unwrap().sessions.breaks.extend(breaks);
}

#[test]
fn a_commands_output_and_exit_code_are_ours() {
    let shell = Shell::new();
    assert_eq!(shell.ok("exec sb-1 --wait -- echo a --json b"), "a --json b\n");
    let output = shell.run("exec sb-1 -- bytes");
    assert_eq!(output.stdout, b"\xff\0out");
    assert_eq!(output.stderr, b"\xfeerr");
    for (line, code) in [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 137", 137),
        ("sleep", 124),
        ("secret x", 126),
        ("gone", 127),
        ("nothing x", 127),
    ] {
        assert_eq!(shell.run(&format!("exec sb-1 -- {line}")).status.code(), Some(code), "{line}");
    }
    let output = shell.run("exec sb-1 --json -- exit 9");
    assert_eq!(output.status.code(), Some(9));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["exitCode"], 9);
}

#[test]
fn a_command_gets_what_it_was_given() {
    let shell = Shell::new();
    let line = "exec sb-1 --timeout 5 --cwd /tmp --user root --env B=2 --env A=1 -- echo x";
    shell.ok(line);
    {
        let state = shell.mesh.state.lock().unwrap();
        let request = &state.sessions.started[0];
        assert_eq!((request.timeout, request.cwd.as_str(), request.user.as_str()), (5, "/tmp", "root"));
        assert_eq!((request.envs["A"].as_str(), request.envs.len()), ("1", 2));
        assert!(request.terminal.is_none());
    }
    let line = "exec sb-1 --json --timeout 5 --cwd /tmp --user root --env B=2 --env A=1 -- describe";
    let described: Value = serde_json::from_str(&shell.ok(line)).unwrap();
    let described = described["stdout"].as_str().unwrap();
    assert!(described.starts_with(r#"Some(5) [("A", "1"), ("B", "2")] /tmp root Some("35"#), "{described}");
    assert!(shell.ok("exec sb-1 --json --timeout 0 -- describe").contains("None"));
    // A script may be a single word.
    shell.ok("exec sb-1 -- bytes");
    assert_eq!(shell.mesh.state.lock().unwrap().sessions.started[1].args, ["-c", "bytes"]);
}

#[test]
fn output_comes_while_the_command_runs() {
    let shell = Shell::new();
    let (mut child, mut stdout) = spawn(&shell, "exec sb-1 -- waits");
    shell.mesh.until("it is started", |state| state.sessions.attached.len() == 1);
    let mut line = String::new();
    shell.mesh.session("s1", |session| session.write(ExecStream::Stdout, b"first\n"));
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "first\n");
    shell.mesh.session("s1", |session| {
        session.write(ExecStream::Stdout, b"second\n");
        session.end(4);
    });
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "first\nsecond\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn standard_input_of_any_size_is_passed_on() {
    let shell = Shell::new();
    let bytes = noise(5_000_001);
    let output = feed(&shell, "exec sb-1 -i -- cat", bytes.clone());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout == bytes);
    assert_eq!(feed(&shell, "exec sb-1 --stdin -- count", bytes).stdout, b"5000001\n");
    assert_eq!(feed(&shell, "exec sb-1 -i -- count", Vec::new()).stdout, b"0\n");
}

#[test]
fn one_call_takes_standard_input_up_to_its_limit() {
    let shell = Shell::new();
    let bytes = vec![b'x'; 1 << 20];
    let output = feed(&shell, "exec sb-1 --stdin --json -- cat", bytes.clone());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["stdout"].as_str().unwrap().len(), bytes.len());
    let output = feed(&shell, "exec sb-1 --stdin --json -- cat", [bytes.as_slice(), b"x"].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("oc files cp"));
}

#[test]
fn output_is_whole_however_often_the_connection_breaks() {
    let shell = Shell::new();
    let at = |output, how| Break { output, input: usize::MAX, how };
    breaks(
        &shell,
        [
            at(0, How::Ends),
            at(1, How::Unavailable),
            at(5_000, How::BrokenPipe),
            at(700_001, How::Unavailable),
        ],
    );
    let output = shell.run("exec sb-1 -- flood 1000000");
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    let (stdout, stderr) = shell
        .mesh
        .session("s1", |session| (session.written(ExecStream::Stdout), session.written(ExecStream::Stderr)));
    assert!(output.stdout == stdout);
    // Between what the command wrote we say what happened.
    let said = output.stderr.len() - stderr.len();
    assert!(said < 500 && text(&output.stderr).contains("the host is gone; attaching again"), "{said}");
    let offsets: Vec<_> =
        shell.mesh.state.lock().unwrap().sessions.attached.iter().map(|start| start.offset).collect();
    assert_eq!(offsets, [0, 0, 1, 5_001, 705_002]);
}

#[test]
fn input_comes_once_however_often_the_connection_breaks() {
    let shell = Shell::new();
    let at = |input, how| Break { output: usize::MAX, input, how };
    breaks(
        &shell,
        [
            at(1, How::Unavailable),
            at(100_000, How::BrokenPipe),
            at(300_000, How::Ends),
            at(0, How::Unavailable),
        ],
    );
    let bytes = noise(2_000_000);
    let output = feed(&shell, "exec sb-1 -i -- cat", bytes.clone());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout == bytes);
    assert!(shell.mesh.session("s1", |session| session.stdin == bytes));
    let state = shell.mesh.state.lock().unwrap();
    let names: Vec<_> = state.sessions.attached.iter().map(|start| &start.attachment_id).collect();
    assert!(names.iter().all(|name| *name == names[0]) && names.len() == 5);
}

#[test]
fn what_was_written_is_acknowledged() {
    let shell = Shell::new();
    let (mut child, mut stdout) = spawn(&shell, "exec sb-1 -- waits");
    shell.mesh.until("it is started", |state| state.sessions.attached.len() == 1);
    shell.mesh.session("s1", |session| session.write(ExecStream::Stdout, &noise(100_000)));
    stdout.read_exact(&mut vec![0; 100_000]).unwrap();
    shell.mesh.until("it is acknowledged", |state| state.sessions.all[0].acknowledged == 100_000);
    shell.mesh.session("s1", |session| session.end(0));
    assert!(child.wait().unwrap().success());
}

#[test]
fn output_that_is_missing_is_told() {
    let shell = Shell::new();
    let output = shell.run("exec sb-1 -- much");
    assert_eq!(output.stdout, b"end");
    assert!(text(&output.stderr).contains("oc: 99 bytes of output are missing here"));
}

#[test]
fn a_sandbox_that_hibernates_is_not_woken_and_the_way_back_is_told() {
    let shell = Shell::new();
    let output = shell.run("exec sb-1 -- hibernates");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(output.stdout, b"before\n");
    let error = text(&output.stderr);
    assert!(
        error.contains("`oc exec attach sb-1 s1 --offset 7`") && error.contains("code: INTERRUPTED"),
        "{error}"
    );
    assert_eq!(shell.mesh.state.lock().unwrap().sessions.attached.len(), 1);
    shell.mesh.session("s1", |session| {
        session.hibernates = false;
        session.write(ExecStream::Stdout, b"after\n");
        session.end(6);
    });
    let output = shell.run("exec attach sb-1 s1 --offset 7");
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(6), b"after\n".as_slice()));
}

#[test]
fn ctrl_c_goes_to_the_command_and_a_second_one_kills_it() {
    let shell = Shell::new();
    let (mut child, _stdout) = spawn(&shell, "exec sb-1 -- slow");
    shell.mesh.until("it is attached", |state| state.sessions.attached.len() == 1);
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    shell.mesh.session("s1", |session| assert_eq!(session.signals, [2]));

    let (mut child, _stdout) = spawn(&shell, "exec sb-1 -- stubborn");
    shell.mesh.until("it is attached", |state| state.sessions.attached.len() == 2);
    signal(&child, Signal::SIGINT);
    shell.mesh.until("it gets the signal", |state| state.sessions.all[1].signals == [2]);
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    shell.mesh.until("it is killed", |state| state.sessions.all[1].signals == [2, 9]);
}

#[test]
fn what_ends_us_ends_the_command() {
    let shell = Shell::new();
    let (mut child, _stdout) = spawn(&shell, "exec sb-1 -- slow");
    shell.mesh.until("it is attached", |state| state.sessions.attached.len() == 1);
    signal(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    // Not waited for beyond a few seconds, here and below.
    shell.mesh.until("it is told", |state| state.sessions.all[0].signals == [15]);
    // A reader that goes, too.
    let (mut child, stdout) = spawn(&shell, "exec sb-1 -- waits");
    shell.mesh.until("it is attached", |state| state.sessions.attached.len() == 2);
    drop(stdout);
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        // More than once: another test's child has our end of the pipe too until it is what it is to be.
        shell.mesh.session("s2", |session| session.write(ExecStream::Stdout, b"x"));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "never: it ends with its reader");
        std::thread::park_timeout(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(141));
    shell.mesh.until("it is told", |state| state.sessions.all[1].signals == [13]);
    // Input that cannot be read, too.
    let directory = std::fs::File::open("/").unwrap();
    let status = shell.command("exec -i sb-1 -- waits").stdin(directory).status().unwrap();
    assert_eq!(status.code(), Some(1));
    shell.mesh.until("it is told", |state| state.sessions.all[2].signals == [1]);
}

#[test]
fn ctrl_c_ends_one_call() {
    let shell = Shell::new();
    let mut child = shell.command("exec sb-1 --json -- slow").spawn().unwrap();
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn sessions_are_listed_attached_to_killed_and_asked_for_their_result() {
    let shell = Shell::new();
    assert_eq!(shell.ok("exec -d sb-1 -- waits a"), "s1\n");
    let started: Value = serde_json::from_str(&shell.ok("exec -d --json sb-1 -- bytes")).unwrap();
    assert_eq!(started["sessionID"], "s2");
    assert_eq!(shell.mesh.state.lock().unwrap().sessions.started[0].timeout, 0);
    let listed = shell.json("exec list sb-1");
    assert_eq!((&listed[0]["command"], &listed[0]["running"]), (&"waits".into(), &true.into()));
    let table = shell.ok("exec ls sb-1");
    assert!(table.contains("command  running") && table.contains("waits a"), "{table}");
    assert!(table.contains("exited 0"), "{table}");

    let output = shell.run("exec attach sb-1 s2 --offset 2");
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (b"out".as_slice(), b"\xfeerr".as_slice())
    );
    assert_eq!(shell.refused("exec list sb-1 --unknown").0, 2);
    assert_eq!(shell.run("exec attach sb-1 none").status.code(), Some(3));

    shell.ok("exec kill sb-1 s1 --signal TERM");
    shell.mesh.session("s1", |session| assert_eq!(session.signals, [15]));
    assert_eq!(shell.refused("exec kill sb-1 none"), (3, "SESSION_NOT_FOUND".to_owned()));

    shell.ok("exec -d sb-1 -- waits");
    let output = shell.run("exec result sb-1 s3");
    assert_eq!(output.status.code(), Some(3));
    let output = shell.run("exec result sb-1 s2 --json");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["exitCode"], &answer["stderrBase64"]), (&0.into(), &"/mVycg==".into()));
}

#[test]
fn who_attaches_may_go_and_may_type() {
    let shell = Shell::new();
    shell.ok("exec -d sb-1 -- cat");
    let (mut child, _stdout) = spawn(&shell, "exec attach sb-1 s1");
    shell.mesh.until("it is attached", |state| state.sessions.attached.len() == 1);
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    // It is left without an answer where that does not come soon.
    shell.mesh.until("it is told that we go", |state| state.sessions.all[0].detached == 1);
    shell.mesh.session("s1", |session| assert!(session.signals.is_empty()));
    let output = feed(&shell, "exec attach -i sb-1 s1", b"typed".to_vec());
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"typed".as_slice()));
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let shell = Shell::new();
    for line in [
        "exec sb-1",
        "exec sb-1 --json -t -- x",
        "exec -it sb-1 -- x",
        "exec -d -i sb-1 -- x",
        "exec attach sb-1 s1 --json",
        "exec kill sb-1 s1 --signal 0",
        "shell sb-1",
    ] {
        assert_eq!(shell.run(line).status.code(), Some(2), "{line}");
    }
    // Without keys, nobody needs a terminal here.
    assert_eq!(shell.ok("exec -t sb-1 -- echo x"), "x\n");
    let state = shell.mesh.state.lock().unwrap();
    assert_eq!(state.sessions.started[0].terminal.unwrap().cols, 80);
}
