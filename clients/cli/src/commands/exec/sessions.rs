//! `oc exec list`, `attach`, `kill` and `result`: sessions that were started before.

use std::{io::Write as _, time::Duration};

use jiff::Timestamp;
use oc_proto::v1::{
    ExecKind, ExecSession, GetExecRequest, GetExecResultRequest, GetExecResultResponse, KillExecRequest,
    ListExecsRequest,
};

use crate::{
    arguments::{
        Global,
        exec::{AttachArguments, SessionCommand},
    },
    commands::{connect, sandboxes::age},
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    foreground::{Bond, Foreground, Input, TIMED_OUT},
    json,
    output::{self, Output},
    progress, quote,
    signals::{Signals, until_interrupted},
    terminal,
};

/// How long one call waits for the end of a session.
const WAIT_MS: i32 = 20_000;

/// `oc exec list|attach|kill|result`.
pub async fn run(global: &Global, command: SessionCommand, output: Output) -> Result<u8, Failure> {
    if let SessionCommand::Attach(arguments) = command {
        return attach(global, &arguments, output).await;
    }
    until_interrupted(async {
        let connection = connect(global).await?;
        match command {
            SessionCommand::List { id } => list(&connection, id, output).await,
            SessionCommand::Kill { id: sandbox_id, session: session_id, signal } => {
                let request = KillExecRequest { sandbox_id, session_id, signal: Some(signal) };
                connection.exec().kill_exec(within(CALL_TIMEOUT, request)).await?;
                output.done()?;
                Ok(0)
            }
            SessionCommand::Result { id, session } => result(&connection, &id, &session, output).await,
            // Decides itself what a signal means.
            SessionCommand::Attach(_) => Ok(0),
        }
    })
    .await
}

/// The command that attaches to a session again.
pub fn way_back(sandbox_id: &str, session_id: &str, input: Input) -> String {
    let flag = if input == Input::Nothing { "" } else { " -i" };
    format!("oc exec attach {sandbox_id} {session_id}{flag}")
}

async fn attach(global: &Global, arguments: &AttachArguments, output: Output) -> Result<u8, Failure> {
    if output.is_json() {
        let message =
            "what a session writes has no JSON form as it comes: leave out --json, or use `oc exec result`";
        return Err(Failure::Usage(message.to_owned()));
    }
    let AttachArguments { id, session: session_id, offset, stdin } = arguments;
    let mut signals = Signals::listen()?;
    let found = async {
        let connection = connect(global).await?;
        let session = find(&connection, id, session_id).await?;
        Ok::<_, Failure>((connection, session))
    };
    let (connection, session) = tokio::select! {
        found = found => found?,
        code = signals.ending() => return Ok(code),
    };
    let has_terminal = session.terminal.is_some();
    let input = match stdin {
        false => Input::Nothing,
        true if has_terminal && terminal::is_input() => Input::Keys,
        true => Input::Bytes,
    };
    let session = Foreground {
        connection: &connection,
        sandbox_id: id,
        session_id,
        has_terminal,
        offset: *offset,
        input,
        bond: Bond::Free,
        way_back: way_back(id, session_id, input),
    };
    session.run(&mut signals).await
}

/// Describes a session.
pub async fn find(
    connection: &Connection,
    sandbox_id: &str,
    session_id: &str,
) -> Result<ExecSession, Failure> {
    let request = GetExecRequest { sandbox_id: sandbox_id.to_owned(), session_id: session_id.to_owned() };
    let answer = connection.exec().get_exec(within(CALL_TIMEOUT, request)).await?;
    Ok(answer.into_inner().session.unwrap_or_default())
}

async fn list(connection: &Connection, sandbox_id: String, output: Output) -> Result<u8, Failure> {
    let request = within(CALL_TIMEOUT, ListExecsRequest { sandbox_id });
    let sessions = connection.exec().list_execs(request).await?.into_inner().sessions;
    output.show(|| json::list(&sessions), || table(&sessions, Timestamp::now()))?;
    Ok(0)
}

fn table(sessions: &[ExecSession], now: Timestamp) -> String {
    let rows = sessions.iter().map(|session| {
        [
            session.session_id.clone(),
            kind(session.kind()).to_owned(),
            status(session),
            session.started_at.map(|at| age(at.seconds, now)).unwrap_or_default(),
            session.output_bytes.to_string(),
            session.attached_clients.to_string(),
            command(session),
        ]
    });
    output::table(["ID", "KIND", "STATUS", "AGE", "OUTPUT", "CLIENTS", "COMMAND"], rows)
}

fn kind(kind: ExecKind) -> &'static str {
    match kind {
        ExecKind::Unspecified => "other",
        ExecKind::Command => "command",
        ExecKind::Terminal => "terminal",
        ExecKind::Agent => "agent",
    }
}

fn status(session: &ExecSession) -> String {
    match (session.running, session.timed_out, session.exit_code) {
        (true, ..) => "running".to_owned(),
        (_, true, _) => "timed out".to_owned(),
        (_, _, code) => format!("exited {}", code.unwrap_or_default()),
    }
}

/// As it would be typed, but no longer than a line.
fn command(session: &ExecSession) -> String {
    const CHARACTERS: usize = 60;
    let plain = |word: &str| {
        !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c))
    };
    let words = std::iter::once(&session.command).chain(&session.args);
    let words: Vec<_> =
        words.map(|word| if plain(word) { word.clone() } else { quote::quote(word) }).collect();
    let line = words.join(" ");
    match line.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

async fn result(
    connection: &Connection,
    sandbox_id: &str,
    session_id: &str,
    output: Output,
) -> Result<u8, Failure> {
    let ended = progress::during("waiting", async {
        loop {
            let request = GetExecResultRequest {
                sandbox_id: sandbox_id.to_owned(),
                session_id: session_id.to_owned(),
                wait_ms: Some(WAIT_MS),
            };
            let deadline = CALL_TIMEOUT + Duration::from_millis(WAIT_MS.unsigned_abs().into());
            let answer = connection.exec().get_exec_result(within(deadline, request)).await?.into_inner();
            if !answer.running {
                return Ok::<_, Failure>(answer);
            }
        }
    })
    .await?;
    if output.is_json() {
        output.show(|| json::of(&ended), String::new)?;
        return Ok(exit_code(&ended));
    }
    output.bytes(&ended.stdout)?;
    // As a program that runs here: nobody is told that standard error is closed.
    let _ = std::io::stderr().lock().write_all(&ended.stderr);
    if ended.truncated {
        output::note("oc: only the end of the output is kept");
    }
    Ok(exit_code(&ended))
}

fn exit_code(ended: &GetExecResultResponse) -> u8 {
    if ended.timed_out {
        return TIMED_OUT;
    }
    u8::try_from(ended.exit_code.unwrap_or_default()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let session = |args: &[&str]| ExecSession {
            command: "sh".into(),
            args: args.iter().map(|&word| word.to_owned()).collect(),
            ..ExecSession::default()
        };
        assert_eq!(command(&session(&["-c", "a 'b'", ""])), r"sh -c 'a '\''b'\''' ''");
        let long = command(&session(&["ä".repeat(100).as_str()]));
        assert_eq!(long.chars().count(), 61);
    }
}
