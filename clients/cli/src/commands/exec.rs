//! `oc exec`: runs a command to its end; its output is ours, byte for byte, and so is its exit code.

use std::{io::Write as _, time::Duration};

use oc_proto::v1::{RunRequest, RunResponse};
use tokio::io::AsyncReadExt as _;
use tonic::Request;

use crate::{
    arguments::ExecArguments,
    connection::Connection,
    failure::Failure,
    json,
    output::{self, Output},
    progress, standard,
};

/// Exit code after the timeout, as `timeout(1)` has it.
const TIMED_OUT: u8 = 124;
/// Exit codes of shells for a program that cannot be run, or found.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// What the guest assumes where no timeout is given.
const DEFAULT_TIMEOUT_SECONDS: i32 = 60;
/// What a call may take beside the command: a wake-up, the way there and back.
const GRACE: Duration = Duration::from_secs(30);
/// The guest takes no more.
const STDIN_BYTES: u64 = 1 << 20;

/// `oc exec`.
pub async fn run(connection: &Connection, arguments: ExecArguments, output: Output) -> Result<u8, Failure> {
    let stdin = if arguments.stdin { read_stdin().await? } else { Vec::new() };
    let mut command = arguments.command.into_iter();
    let message = RunRequest {
        sandbox_id: arguments.id,
        cmd: command.next().unwrap_or_default(),
        args: command.collect(),
        envs: arguments.env.into_iter().collect(),
        cwd: arguments.cwd.unwrap_or_default(),
        timeout: arguments.timeout,
        user: arguments.user.unwrap_or_default(),
        stdin: stdin.into(),
    };
    let mut request = Request::new(message);
    if let Some(deadline) = deadline(arguments.timeout) {
        request.set_timeout(deadline);
    }
    let mut client = connection.exec();
    match progress::during("running", client.run(request)).await {
        Ok(response) => finish(&response.into_inner(), output),
        Err(status) => {
            let failure = Failure::from(status);
            let code = match failure.code().as_str() {
                "COMMAND_NOT_FOUND" => NOT_FOUND,
                "COMMAND_NOT_EXECUTABLE" => NOT_EXECUTABLE,
                _ => return Err(failure),
            };
            failure.report(output.is_json());
            Ok(code)
        }
    }
}

/// When to give up on the call; never, if the command may run for ever.
fn deadline(timeout: Option<i32>) -> Option<Duration> {
    let seconds = u64::try_from(timeout.unwrap_or(DEFAULT_TIMEOUT_SECONDS)).unwrap_or(0);
    (seconds > 0).then(|| Duration::from_secs(seconds) + GRACE)
}

async fn read_stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    standard::input()?
        .take(STDIN_BYTES + 1)
        .read_to_end(&mut bytes)
        .await
        .map_err(|error| Failure::local("cannot read standard input", error))?;
    if bytes.len() as u64 > STDIN_BYTES {
        let message =
            "standard input holds more than 1 MiB: copy it with `oc files cp - ID:PATH` and read it there";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(bytes)
}

fn finish(response: &RunResponse, output: Output) -> Result<u8, Failure> {
    if output.is_json() {
        output.show(|| json::of(response), String::new)?;
        return Ok(exit_code(response));
    }
    output.bytes(&response.stdout)?;
    // As a program that runs here: nobody is told that standard error is closed.
    let _ = std::io::stderr().lock().write_all(&response.stderr);
    if response.truncated {
        output::note(format_args!(
            "oc: only the end of the output is shown: it was {} bytes, and {} on standard error",
            response.stdout_bytes, response.stderr_bytes
        ));
    }
    Ok(exit_code(response))
}

/// The command's exit code, as far as a process can have it.
fn exit_code(response: &RunResponse) -> u8 {
    if response.timed_out {
        return TIMED_OUT;
    }
    u8::try_from(response.exit_code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_outlives_the_command_and_has_no_end_without_a_timeout() {
        assert_eq!(deadline(None), Some(Duration::from_secs(90)));
        assert_eq!(deadline(Some(5)), Some(Duration::from_secs(35)));
        assert_eq!(deadline(Some(0)), None);
    }

    #[test]
    fn exit_codes_are_the_commands_own() {
        let ended = |exit_code, timed_out| RunResponse { exit_code, timed_out, ..RunResponse::default() };
        assert_eq!(exit_code(&ended(0, false)), 0);
        assert_eq!(exit_code(&ended(137, false)), 137);
        assert_eq!(exit_code(&ended(-1, true)), TIMED_OUT);
        assert_eq!(exit_code(&ended(-1, false)), 255);
    }
}
