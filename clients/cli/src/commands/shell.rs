//! `oc shell`: a shell on a terminal in a sandbox, which is ours for as long as it lasts.
//!
//! It ends with the shell's exit code. Ctrl-P Ctrl-Q leaves the shell running and says how to come back; closing our
//! terminal hangs it up, unless it is to be kept.

use std::env;

use oc_proto::v1::{ExecSession, StartTerminalRequest};

use crate::{
    arguments::{Global, exec::ShellArguments},
    commands::{
        connect,
        exec::{START_TIMEOUT, WINDOW, sessions},
    },
    connection::{Connection, within},
    failure::Failure,
    foreground::{Bond, Foreground, Input},
    output::Output,
    progress,
    signals::Signals,
    terminal,
};

/// What programs want to know about our terminal.
const TERMINAL_VARIABLES: [&str; 2] = ["TERM", "COLORTERM"];
/// What a shell that is come back to shows again: the last few lines, its prompt among them. More could hold questions to
/// a terminal that were answered long ago.
const REPLAY_BYTES: u64 = 2048;

/// `oc shell`.
pub async fn run(global: &Global, arguments: ShellArguments, output: Output) -> Result<u8, Failure> {
    if output.is_json() || !terminal::is_input() {
        let message = "a shell needs a terminal: run commands with `oc exec`";
        return Err(Failure::Usage(message.to_owned()));
    }
    let mut signals = Signals::listen()?;
    let found = async {
        let connection = connect(global).await?;
        let (session, offset) = progress::during("starting", open(&connection, &arguments)).await?;
        Ok::<_, Failure>((connection, session, offset))
    };
    let (connection, session, offset) = tokio::select! {
        found = found => found?,
        code = signals.ending() => return Ok(code),
    };
    let session = Foreground {
        connection: &connection,
        sandbox_id: &arguments.id,
        session_id: &session.session_id,
        has_terminal: session.terminal.is_some() || arguments.attach.is_none(),
        offset,
        input: Input::Keys,
        bond: if arguments.keep { Bond::Free } else { Bond::Ours },
        way_back: format!("oc shell {} --attach {}", arguments.id, session.session_id),
    };
    session.run(&mut signals).await
}

/// The session, and where to begin in its output.
async fn open(connection: &Connection, arguments: &ShellArguments) -> Result<(ExecSession, u64), Failure> {
    if let Some(session_id) = &arguments.attach {
        let session = sessions::find(connection, &arguments.id, session_id).await?;
        if session.terminal.is_none() {
            return Err(Failure::Usage(format!(
                "{session_id} has no terminal: `{}`",
                sessions::way_back(&arguments.id, session_id, Input::Bytes)
            )));
        }
        let last_lines = session.output_bytes.saturating_sub(REPLAY_BYTES);
        let offset = arguments.offset.unwrap_or(last_lines);
        return Ok((session, offset));
    }
    let size = terminal::size().unwrap_or(WINDOW);
    let ours =
        TERMINAL_VARIABLES.into_iter().filter_map(|name| Some((name.to_owned(), env::var(name).ok()?)));
    let message = StartTerminalRequest {
        sandbox_id: arguments.id.clone(),
        cols: size.cols,
        rows: size.rows,
        shell: arguments.shell.clone().unwrap_or_default(),
        envs: ours.chain(arguments.env.iter().cloned()).collect(),
        cwd: arguments.cwd.clone().unwrap_or_default(),
        user: arguments.user.clone().unwrap_or_default(),
        ..StartTerminalRequest::default()
    };
    let answer = connection.exec().start_terminal(within(START_TIMEOUT, message)).await?.into_inner();
    Ok((answer.session.unwrap_or_default(), 0))
}
