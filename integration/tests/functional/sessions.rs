//! Sessions: live output, input, replays, terminals, and what is refused.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, PATIENCE, eventually},
    rest::Sandbox,
    streams::{Connection, Progress, Sessions},
};
use oc_mesh::error::reason_of;
use oc_proto::v1::{
    AttachStart, ExecAcknowledgement, ExecDetach, ExecSignal, ExecStdin, StartExecRequest, TerminalSize,
    attach_exec_request::Input, attach_exec_response::Event,
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tonic::Status;

async fn begin(mesh: &Mesh) -> anyhow::Result<(Sandbox, Sessions)> {
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    let sessions = Sessions::of(mesh, &sandbox.id);
    Ok((sandbox, sessions))
}

/// Reads output until it holds `wanted`.
async fn until(connection: &mut Connection, wanted: &str) -> anyhow::Result<String> {
    let mut shown = Vec::new();
    loop {
        match connection.next().await? {
            Event::Output(output) => shown.extend_from_slice(&output.data),
            Event::Exit(exit) => anyhow::bail!("{exit:?} after {}", String::from_utf8_lossy(&shown)),
            _ => {}
        }
        let text = String::from_utf8_lossy(&shown);
        if text.contains(wanted) {
            return Ok(text.into_owned());
        }
    }
}

async fn type_in(connection: &Connection, text: &str) -> anyhow::Result<()> {
    let data = text.to_owned().into();
    ensure!(connection.say(Input::Stdin(ExecStdin { offset: 0, data })).await, "nobody listens");
    Ok(())
}

fn reason(error: &Status) -> String {
    reason_of(error).unwrap_or_else(|| error.to_string())
}

pub async fn a_session_takes_and_gives_every_byte(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let id = sessions.start("tee /dev/stderr; echo end; exit 3").await?;
    let outcome = sessions.follow(&id, &sent, &[1, 100_000, 7, 65_536]).await?;
    assert_eq!(outcome.exit.exit_code, 3);
    assert!(outcome.stderr == sent, "standard error is not as it was sent");
    assert!(outcome.stdout == [&sent[..], b"end\n"].concat(), "standard output is not");
    assert_eq!(outcome.returns, 0);
    // Who comes later is told what is still there, and what is not.
    let mut late = sessions.attach(&id, AttachStart::default()).await?;
    let Event::Attached(attached) = late.next().await? else { panic!("not attached") };
    let session = attached.session.context("no session")?;
    assert!(!session.running && session.exit_code == Some(3));
    assert_eq!(session.output_bytes, 6_000_004);
    assert_eq!((attached.offset, attached.dropped_bytes), (session.dropped_bytes, session.dropped_bytes));
    assert!(attached.offset > 6_000_004 - (1 << 20) - (256 << 10));
    let (mut next, mut ends) = (attached.offset, 0);
    loop {
        match late.next().await? {
            Event::Output(output) => {
                assert_eq!(output.offset, next);
                next += output.data.len() as u64;
            }
            Event::Replayed(replayed) => {
                assert_eq!((replayed.offset, next), (6_000_004, 6_000_004));
                ends += 1;
            }
            Event::Exit(exit) => {
                assert_eq!((exit.exit_code, exit.offset, ends), (3, 6_000_004, 1));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    sandbox.delete().await
}

pub async fn a_session_goes_on_through_hibernation(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.02; done; cat";
    let id = sessions.start(script).await?;
    let sent: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[n as usize % 2]).collect();
    let (tells, mut progress) = watch::channel(Progress::default());
    let follower = {
        let (sessions, id, sent) = (sessions.clone(), id.clone(), sent.clone());
        tokio::spawn(async move { sessions.follow_and_tell(&id, &sent, &[1000], &tells).await })
    };
    for round in 0..3 {
        // It has come back and reads on.
        let back = timeout(PATIENCE, progress.wait_for(|at| at.returns >= round)).await??.offset;
        timeout(PATIENCE, progress.wait_for(|at| at.offset > back)).await??;
        mesh.rest().post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    }
    let outcome = follower.await??;
    assert!(outcome.returns >= 3, "{}", outcome.returns);
    let lines: String = (0..400).map(|n| format!("line {n}\n")).collect();
    assert!(outcome.stdout == [lines.as_bytes(), &sent].concat());
    sandbox.delete().await
}

pub async fn a_terminal_is_one(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let made =
        mesh.rest().post(&sandbox.path("/pty"), json!({ "cols": 90, "rows": 30 })).await?.expect(201)?;
    let id = made.json()["sessionID"].as_str().context("no ID")?.to_owned();
    let mut terminal = sessions.attach(&id, AttachStart::default()).await?;
    until(&mut terminal, "$ ").await?;
    type_in(&terminal, "stty size; echo $TERM $LANG; tty; shopt -q login_shell && echo a log''in\n").await?;
    let shown = until(&mut terminal, "a login\r\n").await?;
    assert!(shown.contains("30 90\r\nxterm-256color C.UTF-8\r\n/dev/pts/"), "{shown}");
    // Another who looks on sees the same, from the beginning.
    let mut onlooker = sessions.attach(&id, AttachStart::default()).await?;
    until(&mut onlooker, "a login\r\n").await?;
    // Job control: what runs is suspended, goes on, and is interrupted.
    type_in(&terminal, "sleep 1000\n").await?;
    until(&mut terminal, "sleep 1000").await?;
    eventually("it sleeps", async || sandbox.run("pgrep -x sleep").await).await?;
    type_in(&terminal, "\x1a").await?;
    until(&mut terminal, "Stopped").await?;
    type_in(&terminal, "fg\n").await?;
    until(&mut terminal, "sleep 1000\r\n").await?;
    // The shell says so before it hands the terminal over: until then a Ctrl-C would be its own.
    let in_front = "ps -o stat= -C sleep | grep -q '^S.*+'";
    eventually("it goes on", async || sandbox.run(in_front).await).await?;
    type_in(&terminal, "\x03").await?;
    until(&mut terminal, "^C").await?;
    // UTF-8 comes as it is, and the size follows.
    type_in(&terminal, "echo 'ä€𝄞'\n").await?;
    until(&mut terminal, "\rä€𝄞\r\n").await?;
    terminal.say(Input::Resize(TerminalSize { cols: 133, rows: 43 })).await;
    type_in(&terminal, "stty size\n").await?;
    until(&mut terminal, "43 133\r\n").await?;
    let path = sandbox.path(&format!("/pty/{id}/resize"));
    mesh.rest().post(&path, json!({ "cols": 77, "rows": 22 })).await?.expect(204)?;
    type_in(&terminal, "stty size; stty raw -echo; head -c 256 | od -An -v -tx1 -w256 | tr -d ' '; exit 9\n")
        .await?;
    until(&mut terminal, "22 77").await?;
    // Every byte comes as it is in raw mode, control characters, too.
    eventually("it reads raw bytes", async || sandbox.run("pgrep -x head").await).await?;
    let all: Vec<u8> = (0..=255).collect();
    terminal.say(Input::Stdin(ExecStdin { offset: 0, data: all.clone().into() })).await;
    let hex: String = all.iter().map(|byte| format!("{byte:02x}")).collect();
    until(&mut terminal, &hex).await?;
    loop {
        if let Event::Exit(exit) = terminal.next().await? {
            assert_eq!(exit.exit_code, 9);
            break;
        }
    }
    until(&mut onlooker, &hex).await?;
    sandbox.delete().await
}

pub async fn a_flood_waits_for_its_reader_and_disturbs_no_other(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let flood = sessions.start("exec cat /dev/zero").await?;
    let terms = AttachStart { acknowledges: true, ..Default::default() };
    let mut reader = sessions.attach(&flood, terms).await?;
    // A piece that does not fit waits whole, and none is larger than 256 KiB; each counts for 64 bytes more than it has, and none is
    // smaller than a page: all but so much of the ring is filled for certain.
    let (ring, piece, counted) = (1 << 20, 256 << 10, 16 << 10);
    let mut read = 0;
    while read < ring - piece - counted {
        if let Event::Output(output) = reader.next().await? {
            read += output.data.len() as u64;
        }
    }
    // Nothing is acknowledged: at most its ring's size is ever written.
    let written = async || -> anyhow::Result<u64> {
        let answer = mesh.rest().get(&sandbox.path(&format!("/exec/{flood}"))).await?.expect(200)?.json();
        answer["outputBytes"].as_u64().with_context(|| format!("no bytes: {answer}"))
    };
    let mut last = 0;
    eventually("it waits", async || {
        let before = std::mem::replace(&mut last, written().await?);
        tokio::time::sleep(Duration::from_millis(300)).await;
        ensure!(before == last, "it goes on");
        Ok(())
    })
    .await?;
    assert!(last <= ring + piece, "{last}");
    // It goes on as what is there is acknowledged, and a quiet session is heard meanwhile.
    reader.say(Input::Acknowledge(ExecAcknowledgement { offset: last })).await;
    let quiet = sessions.start("while read line; do echo heard $line; done").await?;
    let mut other = sessions.attach(&quiet, AttachStart::default()).await?;
    let noise = tokio::spawn(async move {
        let mut offset = 0;
        loop {
            match reader.next().await {
                Ok(Event::Output(output)) => {
                    offset = output.offset + output.data.len() as u64;
                    reader.say(Input::Acknowledge(ExecAcknowledgement { offset })).await;
                }
                Ok(Event::Exit(exit)) => return anyhow::Ok((exit, offset)),
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    });
    for n in 0..50 {
        type_in(&other, &format!("{n}\n")).await?;
        until(&mut other, &format!("heard {n}\n")).await?;
    }
    assert!(written().await? > last);
    mesh.rest().post(&sandbox.path(&format!("/exec/{flood}/kill")), json!({})).await?.expect(204)?;
    let (exit, offset) = noise.await??;
    assert_eq!((exit.exit_code, exit.offset), (137, offset));
    // Where nobody reads nothing waits: what is dropped is told.
    let id = sessions.start("head -c 5000000 /dev/zero").await?;
    let path = sandbox.path(&format!("/exec/{id}/result?waitMs=30000"));
    let result = mesh.rest().get(&path).await?.expect(200)?.json();
    assert_eq!((result["exitCode"].as_i64(), result["truncated"].as_bool()), (Some(0), Some(true)));
    sandbox.delete().await
}

pub async fn a_session_ends_as_it_was_told_to(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let rest = mesh.rest();
    let result = async |id: &str| -> anyhow::Result<Value> {
        let path = sandbox.path(&format!("/exec/{id}/result?waitMs=30000"));
        Ok(rest.get(&path).await?.expect(200)?.json())
    };
    let sleep = |timeout, alone| StartExecRequest {
        cmd: "sh".into(),
        args: vec!["-c".into(), "echo begun; sleep 1000".into()],
        timeout,
        max_run_after_disconnect: alone,
        ..Default::default()
    };
    let timed = sessions.start_with(sleep(5, 0)).await?;
    let ended = result(&timed).await?;
    assert_eq!((ended["exitCode"].as_i64(), ended["timedOut"].as_bool()), (Some(-1), Some(true)));
    assert_eq!(ended["stdout"], "begun\n");
    // It runs as long as somebody is there, and for a while after that.
    let attended = sessions.start_with(sleep(0, 5)).await?;
    let connection = sessions.attach(&attended, AttachStart::default()).await?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(result_now(&rest, &sandbox, &attended).await?["running"], true);
    let gone = Instant::now();
    connection.say(Input::Detach(ExecDetach {})).await;
    assert_eq!(result(&attended).await?["exitCode"], 137);
    assert!(gone.elapsed() >= Duration::from_millis(4900));
    // A signal is the process's to take.
    let trap = "trap 'echo caught; exit 4' TERM; echo ready; while :; do sleep 0.05; done";
    let trapped = sessions.start(trap).await?;
    let mut connection = sessions.attach(&trapped, AttachStart::default()).await?;
    until(&mut connection, "ready").await?;
    connection.say(Input::Signal(ExecSignal { signal: 15 })).await;
    until(&mut connection, "caught").await?;
    assert_eq!(result(&trapped).await?["exitCode"], 4);
    let kill = sandbox.path(&format!("/exec/{trapped}/kill"));
    rest.post(&kill, json!({})).await?.expect(204)?;
    let listed = rest.get(&sandbox.path("/exec")).await?.expect(200)?.json();
    let ids: Vec<_> = listed.as_array().context("no list")?.iter().map(|one| &one["sessionID"]).collect();
    assert_eq!(ids, [&json!(timed), &json!(attended), &json!(trapped)]);
    sandbox.delete().await
}

async fn result_now(rest: &oc_integration::rest::Rest, sandbox: &Sandbox, id: &str) -> anyhow::Result<Value> {
    Ok(rest.get(&sandbox.path(&format!("/exec/{id}/result?waitMs=0"))).await?.expect(200)?.json())
}

pub async fn a_command_that_takes_long_is_asked_after(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, _) = begin(&mesh).await?;
    let rest = mesh.rest();
    let run = sandbox.path("/exec/run-async");
    // How long it takes to end is the guest's matter, and whether that was quick.
    let quick = eventually("one that ends at once", async || {
        rest.post(&run, json!({ "cmd": "echo out; echo err >&2; exit 2" })).await?.expect(200)
    })
    .await?
    .json();
    assert_eq!((&quick["exitCode"], &quick["running"]), (&json!(2), &json!(false)));
    assert_eq!((&quick["stdout"], &quick["stderr"]), (&json!("out\n"), &json!("err\n")));
    assert!(quick.get("execId").is_none(), "{quick}");
    let script = "cat; until test -e go; do sleep 0.1; done; echo done";
    let slow = json!({ "cmd": "sh", "args": ["-c", script], "stdin": "in\n" });
    let slow = rest.post(&run, slow).await?.expect(202)?.json();
    assert!(slow["running"] == true && slow.get("exitCode").is_none() && slow["startedAt"].is_string());
    let id = slow["execId"].as_str().context("no ID")?;
    let path = sandbox.path(&format!("/exec/{id}/result"));
    let first = rest.get(&path).await?.expect(200)?.json();
    assert!(first["running"] == true && first.get("exitCode").is_none(), "{first}");
    sandbox.run("touch go").await?;
    let last = eventually("it has ended", async || {
        let result = rest.get(&path).await?.expect(200)?.json();
        ensure!(result["running"] == false, "{result}");
        Ok(result)
    })
    .await?;
    assert_eq!((&last["exitCode"], &last["stdout"]), (&json!(0), &json!("in\ndone\n")));
    sandbox.delete().await
}

pub async fn bad_sessions_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let rest = mesh.rest();
    let refused = async |path: &str, body: Value| -> anyhow::Result<(u16, String)> {
        Ok(rest.post(&sandbox.path(path), body).await?.refusal())
    };
    let invalid = (400, "INVALID_ARGUMENT".to_owned());
    assert_eq!(refused("/exec", json!({ "cmd": "" })).await?, invalid);
    assert_eq!(refused("/exec", json!({ "cmd": "x", "timeout": -1 })).await?, invalid);
    assert_eq!(refused("/exec", json!({ "cmd": "none" })).await?, (400, "COMMAND_NOT_FOUND".into()));
    assert_eq!(refused("/pty", json!({ "cols": 5000 })).await?, invalid);
    assert_eq!(refused("/pty", json!({ "shell": "/none" })).await?, (400, "COMMAND_NOT_FOUND".into()));
    let missing = (404, "SESSION_NOT_FOUND".to_owned());
    assert_eq!(refused("/exec/0123456789abcdef/kill", json!({})).await?, missing);
    assert_eq!(refused("/pty/0123456789abcdef/resize", json!({ "cols": 1, "rows": 1 })).await?, missing);
    let cat = sessions.start("cat").await?;
    assert_eq!(refused(&format!("/exec/{cat}/kill"), json!({ "signal": 99 })).await?, invalid);
    let resize = format!("/pty/{cat}/resize");
    assert_eq!(refused(&resize, json!({ "cols": 80, "rows": 24 })).await?, (400, "NO_TERMINAL".into()));
    for (cols, rows) in [(0, 0), (65_535, 65_535)] {
        assert_eq!(refused(&resize, json!({ "cols": cols, "rows": rows })).await?, invalid);
    }
    // Streams: each says what is wrong, and the session is as it was.
    let error = sessions.attach("none", AttachStart::default()).await.err().context("attached to nothing")?;
    assert_eq!(reason(&error), "SESSION_NOT_FOUND");
    let long = AttachStart { attachment_id: "x".repeat(65), ..Default::default() };
    assert_eq!(reason(&sessions.attach(&cat, long).await.err().context("taken")?), "INVALID_ARGUMENT");
    let broken = async |input: Input| -> anyhow::Result<String> {
        let named = AttachStart { attachment_id: "bad".into(), ..Default::default() };
        let mut connection = sessions.attach(&cat, named).await?;
        connection.say(input).await;
        loop {
            if let Err(error) = connection.next().await {
                return Ok(reason(&error));
            }
        }
    };
    assert_eq!(broken(Input::Resize(TerminalSize { cols: 0, rows: 0 })).await?, "INVALID_ARGUMENT");
    assert_eq!(broken(Input::Resize(TerminalSize { cols: 80, rows: 24 })).await?, "NO_TERMINAL");
    assert_eq!(broken(Input::Signal(ExecSignal { signal: -1 })).await?, "INVALID_ARGUMENT");
    assert_eq!(broken(Input::Start(AttachStart::default())).await?, "INVALID_ARGUMENT");
    let gap = ExecStdin { offset: 1, data: "x".into() };
    assert_eq!(broken(Input::Stdin(gap)).await?, "INVALID_ARGUMENT");
    let mut first =
        sessions.attach(&cat, AttachStart { attachment_id: "a".into(), ..Default::default() }).await?;
    let _second =
        sessions.attach(&cat, AttachStart { attachment_id: "a".into(), ..Default::default() }).await?;
    let error = loop {
        if let Err(error) = first.next().await {
            break error;
        }
    };
    assert_eq!(reason(&error), "ATTACHED_ELSEWHERE");
    // Another tenant's session is not there.
    let (_, theirs) = mesh.rest_of_new_tenant("elsewhere").await?;
    let foreign = Sessions::of(&mesh, &sandbox.id).with_key(theirs.key());
    let error = foreign.attach(&cat, AttachStart::default()).await.err().context("attached to another's")?;
    assert_eq!(reason(&error), "SANDBOX_NOT_FOUND");
    assert_eq!(theirs.get(&sandbox.path(&format!("/exec/{cat}"))).await?.refusal().0, 404);
    assert_eq!(result_now(&rest, &sandbox, &cat).await?["running"], true);
    sandbox.delete().await
}

pub async fn there_is_an_end_to_sessions_and_attachments(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, sessions) = begin(&mesh).await?;
    let rest = mesh.rest();
    let cat = sessions.start("cat").await?;
    // A thousand who attach to one session: as many as may are served, the others are told.
    let mut attached = Vec::new();
    let mut refused = 0;
    let mut client = sessions.client().await?;
    for number in 1..=1000 {
        // A connection has so many streams only.
        if number % 100 == 0 {
            client = sessions.client().await?;
        }
        match sessions.attach_by(client.clone(), &cat, AttachStart::default()).await {
            Ok(connection) => attached.push(connection),
            Err(error) => {
                assert_eq!(reason(&error), "OVERLOADED");
                refused += 1;
            }
        }
    }
    assert!(attached.len() > 200 && refused > 700, "{} attached, {refused} refused", attached.len());
    drop(attached);
    eventually("all are gone", async || {
        let shown = rest.get(&sandbox.path(&format!("/exec/{cat}"))).await?.expect(200)?.json();
        ensure!(shown["attachedClients"] == 0, "{shown}");
        Ok(())
    })
    .await?;
    let mut started = 1;
    let refusal = loop {
        let answer = rest.post(&sandbox.path("/exec"), json!({ "cmd": "cat" })).await?;
        if answer.status != 201 {
            break answer.refusal();
        }
        started += 1;
    };
    assert_eq!((started, refusal), (64, (429, "TOO_MANY_SESSIONS".into())));
    let listed = rest.get(&sandbox.path("/exec")).await?.expect(200)?.json();
    for session in listed.as_array().context("no list")? {
        let id = session["sessionID"].as_str().context("no ID")?;
        rest.post(&sandbox.path(&format!("/exec/{id}/kill")), json!({})).await?.expect(204)?;
    }
    let begun = Instant::now();
    loop {
        let answer = rest.post(&sandbox.path("/exec"), json!({ "cmd": "true" })).await?;
        if answer.status == 201 {
            break;
        }
        ensure!(begun.elapsed() < PATIENCE, "{answer:?}");
    }
    // A client that vanishes takes nothing with it.
    let id = sessions.start("cat").await?;
    let connection = sessions.attach(&id, AttachStart::default()).await?;
    drop(connection);
    let mut again = sessions.attach(&id, AttachStart::default()).await?;
    type_in(&again, "still there\n").await?;
    timeout(PATIENCE, until(&mut again, "still there")).await??;
    sandbox.delete().await
}
