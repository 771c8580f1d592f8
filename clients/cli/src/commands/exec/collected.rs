//! `oc exec --json`: one call, whose answer holds all that the command wrote.

use std::time::Duration;

use oc_proto::v1::{RunRequest, RunResponse};
use tokio::io::AsyncReadExt as _;
use tonic::Request;

use super::{DEFAULT_TIMEOUT_SECONDS, refused};
use crate::{
    arguments::exec::RunArguments, connection::Connection, failure::Failure, foreground::TIMED_OUT, json,
    output::Output, progress, standard,
};

/// What a call may take beside the command: a wake-up, the way there and back.
const GRACE: Duration = Duration::from_secs(30);
/// The guest takes no more.
const STDIN_BYTES: u64 = 1 << 20;

/// Runs a command to its end and prints what became of it.
pub async fn run(connection: &Connection, arguments: RunArguments, output: Output) -> Result<u8, Failure> {
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
        Ok(response) => {
            let response = response.into_inner();
            output.show(|| json::of(&response), String::new)?;
            Ok(exit_code(&response))
        }
        Err(status) => refused(status.into(), output),
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
        let message = "--json takes no more than 1 MiB of standard input: leave it out, or copy the input with \
                       `oc files cp - ID:PATH` and read it there";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(bytes)
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
