//! `oc exec`: runs a command to its end; its output is ours, byte for byte and as it comes, and so is its exit code.
//!
//! The command is a session, which outlives our connection; see [`crate::foreground`]. With `--json` it is one call whose
//! answer is printed when the command has ended.

pub mod collected;
pub mod sessions;

use std::time::Duration;

use oc_proto::v1::{ExecSession, StartExecRequest, TerminalSize};

use crate::{
    arguments::{
        Global,
        exec::{ExecArguments, RunArguments},
    },
    commands::connect,
    connection::{Connection, within},
    failure::Failure,
    foreground::{Bond, Foreground, Input},
    json,
    output::Output,
    progress,
    signals::{Signals, until_interrupted},
    terminal,
};

/// Exit codes of shells for a program that cannot be run, or found.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// For a command that is to end by itself.
const DEFAULT_TIMEOUT_SECONDS: i32 = 60;
/// For a session to come about; a hibernated sandbox wakes meanwhile.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Where nobody knows the size of a window.
pub const WINDOW: TerminalSize = TerminalSize { cols: 80, rows: 24 };

/// `oc exec …`. The command line is checked before anything is connected to.
pub async fn run(global: &Global, arguments: ExecArguments, output: Output) -> Result<u8, Failure> {
    if let Some(command) = arguments.session {
        return sessions::run(global, command, output).await;
    }
    // One of the two is there, by the definition of the command line.
    let Some(arguments) = arguments.command else { return Err(Failure::Usage("give a command".to_owned())) };
    let input = input(&arguments, terminal::is_input())?;
    if output.is_json() && !arguments.detach {
        if arguments.tty {
            return Err(Failure::Usage("a terminal has no JSON form: leave out --json or -t".to_owned()));
        }
        return until_interrupted(async { collected::run(&connect(global).await?, arguments, output).await })
            .await;
    }
    let mut signals = Signals::listen()?;
    let started = async {
        let connection = connect(global).await?;
        let started = progress::during("starting", start(&connection, &arguments)).await;
        Ok::<_, Failure>((connection, started))
    };
    let (connection, started) = tokio::select! {
        started = started => started?,
        code = signals.ending() => return Ok(code),
    };
    let session = match started {
        Ok(session) => session,
        Err(failure) => return refused(failure, output),
    };
    if arguments.detach {
        output.show(|| json::of(&session), || session.session_id.clone())?;
        return Ok(0);
    }
    let session = Foreground {
        connection: &connection,
        sandbox_id: &arguments.id,
        session_id: &session.session_id,
        has_terminal: arguments.tty,
        offset: 0,
        input,
        bond: Bond::Ours,
        way_back: sessions::way_back(&arguments.id, &session.session_id, input),
    };
    session.run(&mut signals).await
}

/// What the command gets of our standard input.
fn input(arguments: &RunArguments, is_terminal: bool) -> Result<Input, Failure> {
    match (arguments.stdin, arguments.tty) {
        (false, _) => Ok(Input::Nothing),
        (true, false) => Ok(Input::Bytes),
        (true, true) if is_terminal => Ok(Input::Keys),
        (true, true) => Err(Failure::Usage("standard input is no terminal: leave out -t".to_owned())),
    }
}

async fn start(connection: &Connection, arguments: &RunArguments) -> Result<ExecSession, Failure> {
    let (cmd, args) = program(&arguments.command);
    let message = StartExecRequest {
        sandbox_id: arguments.id.clone(),
        cmd,
        args,
        envs: arguments.env.iter().cloned().collect(),
        cwd: arguments.cwd.clone().unwrap_or_default(),
        timeout: timeout(arguments),
        user: arguments.user.clone().unwrap_or_default(),
        terminal: arguments.tty.then(|| terminal::size().unwrap_or(WINDOW)),
        ..StartExecRequest::default()
    };
    let mut client = connection.exec();
    let response = client.start_exec(within(START_TIMEOUT, message)).await?.into_inner();
    Ok(response.session.unwrap_or_default())
}

/// The program and its arguments; a single word is a script.
fn program(command: &[String]) -> (String, Vec<String>) {
    match command {
        [script] => ("/bin/sh".to_owned(), vec!["-c".to_owned(), script.clone()]),
        [program, arguments @ ..] => (program.clone(), arguments.to_vec()),
        [] => (String::new(), Vec::new()),
    }
}

fn timeout(arguments: &RunArguments) -> i32 {
    let ends_by_itself = !(arguments.stdin || arguments.tty || arguments.detach);
    arguments.timeout.unwrap_or(if ends_by_itself { DEFAULT_TIMEOUT_SECONDS } else { 0 })
}

/// What cannot be started has the exit code that a shell would give.
fn refused(failure: Failure, output: Output) -> Result<u8, Failure> {
    let code = match failure.code().as_str() {
        "COMMAND_NOT_FOUND" => NOT_FOUND,
        "COMMAND_NOT_EXECUTABLE" => NOT_EXECUTABLE,
        _ => return Err(failure),
    };
    failure.report(output.is_json());
    Ok(code)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::arguments::{Cli, Command};

    fn arguments(flags: &str) -> RunArguments {
        let line = format!("oc exec sb-1 {flags} -- true");
        let Command::Exec(exec) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not exec")
        };
        exec.command.unwrap()
    }

    #[test]
    fn only_a_command_that_nobody_talks_to_has_a_timeout_unasked() {
        for (flags, seconds) in [
            ("", 60),
            ("--timeout 5", 5),
            ("--timeout 0", 0),
            ("-i", 0),
            ("-t", 0),
            ("-d", 0),
            ("-i --timeout 7", 7),
        ] {
            assert_eq!(timeout(&arguments(flags)), seconds, "{flags}");
        }
    }

    #[test]
    fn keys_need_a_terminal() {
        assert_eq!(input(&arguments("-it"), true).unwrap(), Input::Keys);
        assert_eq!(input(&arguments("-i"), true).unwrap(), Input::Bytes);
        assert_eq!(input(&arguments("-t"), false).unwrap(), Input::Nothing);
        assert!(input(&arguments("-it"), false).is_err());
    }

    #[test]
    fn a_single_word_is_a_script() {
        let words = |line: &str| line.split(' ').map(ToOwned::to_owned).collect::<Vec<_>>();
        assert_eq!(program(&words("ls")), ("/bin/sh".into(), words("-c ls")));
        assert_eq!(program(&["a b | c".to_owned()]).1[1], "a b | c");
        assert_eq!(program(&words("ls -l")), ("ls".into(), words("-l")));
    }
}
