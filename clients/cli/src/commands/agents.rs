//! `oc agent`: agents in a sandbox, what they say, and what they are told.

mod events;
mod render;

use jiff::Timestamp;
use oc_proto::v1::{
    AgentSession, InterruptAgentRequest, KillAgentRequest, ListAgentsRequest, PromptAgentRequest,
    StartAgentRequest,
};

use crate::{
    arguments::{
        Global,
        agents::{AgentCommand, OneAgent, StartArguments},
    },
    commands::{
        connect,
        exec::{START_TIMEOUT, sessions},
        sandboxes::age,
    },
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
    progress,
    signals::{Arrived, INTERRUPTED, Signals, until_interrupted},
};
use events::{Ended, Events, Until};

/// Exit code where an agent did not do what it was told.
const FAILED: u8 = 1;
const SIGKILL: i32 = 9;

/// `oc agent …`.
pub async fn run(global: &Global, command: AgentCommand, output: Output) -> Result<u8, Failure> {
    match command {
        AgentCommand::Start(arguments) => start(global, arguments, output).await,
        AgentCommand::Prompt { agent, text, detach } => prompt(global, &agent, text, detach, output).await,
        others => until_interrupted(run_one(global, others, output)).await,
    }
}

/// The commands that Ctrl-C just ends.
async fn run_one(global: &Global, command: AgentCommand, output: Output) -> Result<u8, Failure> {
    let connection = connect(global).await?;
    match command {
        AgentCommand::Attach { agent, offset } => {
            let ended = Events::new(&connection, &agent, offset, output).follow(Until::End).await?;
            return Ok(exit_code(ended));
        }
        AgentCommand::Interrupt(agent) => {
            interrupt(&connection, &agent).await?;
            output.done()?;
        }
        AgentCommand::Kill { agent, signal } => {
            kill(&connection, &agent, signal).await?;
            output.done()?;
        }
        AgentCommand::List { id: sandbox_id } => {
            let request = within(CALL_TIMEOUT, ListAgentsRequest { sandbox_id });
            let agents = connection.agents().list_agents(request).await?.into_inner().sessions;
            output.show(|| json::list(&agents), || table(&agents, Timestamp::now()))?;
        }
        // These two decide themselves what Ctrl-C means.
        AgentCommand::Start(_) | AgentCommand::Prompt { .. } => {}
    }
    Ok(0)
}

async fn start(global: &Global, arguments: StartArguments, output: Output) -> Result<u8, Failure> {
    let mut signals = Signals::listen()?;
    let StartArguments { id, keep, detach, .. } = &arguments;
    let started = async {
        let connection = connect(global).await?;
        let mut client = connection.agents();
        let request = within(START_TIMEOUT, start_request(&arguments));
        let answer = progress::during("starting", client.start_agent(request)).await?.into_inner();
        Ok::<_, Failure>((connection, answer.session.unwrap_or_default()))
    };
    let (connection, session) = tokio::select! {
        started = started => started?,
        code = signals.ending() => return Ok(code),
    };
    if *detach || arguments.prompt.is_none() {
        output.show(|| json::of(&session), || session.session_id.clone())?;
        return Ok(0);
    }
    let agent = OneAgent { id: id.clone(), session: session.session_id };
    let ended = turn(&connection, &agent, 0, &mut signals, output).await;
    // To end one that hibernates would wake it.
    let hibernates = matches!(ended, Err(Failure::Interrupted(_)));
    if *keep {
        output::note(format_args!(
            "oc: the agent goes on: `oc agent prompt {} {} TEXT`",
            agent.id, agent.session
        ));
    } else if !hibernates {
        // One that has ended is fine, too; what went wrong before is what to tell.
        if let Err(failure) = kill(&connection, &agent, SIGKILL).await {
            output::note(format_args!("oc: the agent {} may go on: {failure}", agent.session));
        }
    }
    ended
}

fn start_request(arguments: &StartArguments) -> StartAgentRequest {
    StartAgentRequest {
        sandbox_id: arguments.id.clone(),
        prompt: arguments.prompt.clone().unwrap_or_default(),
        model: arguments.model.clone(),
        system_prompt: arguments.system_prompt.clone(),
        allowed_tools: arguments.allowed_tools.clone(),
        permission_mode: arguments.permission_mode.clone(),
        max_turns: arguments.max_turns,
        cwd: arguments.cwd.clone().unwrap_or_default(),
        resume: arguments.resume.clone().unwrap_or_default(),
        envs: arguments.env.iter().cloned().collect(),
        ..StartAgentRequest::default()
    }
}

async fn prompt(
    global: &Global,
    agent: &OneAgent,
    text: String,
    detach: bool,
    output: Output,
) -> Result<u8, Failure> {
    let mut signals = Signals::listen()?;
    let told = async {
        let connection = connect(global).await?;
        // What it said before is not asked for.
        let offset = sessions::find(&connection, &agent.id, &agent.session).await?.output_bytes;
        let request =
            PromptAgentRequest { sandbox_id: agent.id.clone(), session_id: agent.session.clone(), text };
        connection.agents().prompt_agent(within(CALL_TIMEOUT, request)).await?;
        Ok::<_, Failure>((connection, offset))
    };
    let (connection, offset) = tokio::select! {
        told = told => told?,
        code = signals.ending() => return Ok(code),
    };
    if detach {
        output.done()?;
        return Ok(0);
    }
    turn(&connection, agent, offset, &mut signals, output).await
}

/// Follows an agent until it has done what it was told. Ctrl-C stops it, a second one leaves it.
async fn turn(
    connection: &Connection,
    agent: &OneAgent,
    offset: u64,
    signals: &mut Signals,
    output: Output,
) -> Result<u8, Failure> {
    let mut events = Events::new(connection, agent, offset, output);
    let mut followed = std::pin::pin!(events.follow(Until::TurnEnds));
    let mut is_interrupted = false;
    loop {
        let arrived = tokio::select! {
            ended = &mut followed => return Ok(exit_code(ended?)),
            arrived = signals.next() => arrived,
        };
        match arrived {
            Arrived::Interrupt if is_interrupted => return Ok(INTERRUPTED),
            Arrived::Interrupt => {
                is_interrupted = true;
                output::note("oc: stopping; once more to leave");
                interrupt(connection, agent).await?;
            }
            Arrived::End(signal) => return Ok(128 + signal),
            Arrived::Resize => {}
        }
    }
}

async fn interrupt(connection: &Connection, agent: &OneAgent) -> Result<(), Failure> {
    let request = InterruptAgentRequest { sandbox_id: agent.id.clone(), session_id: agent.session.clone() };
    connection.agents().interrupt_agent(within(CALL_TIMEOUT, request)).await?;
    Ok(())
}

async fn kill(connection: &Connection, agent: &OneAgent, signal: i32) -> Result<(), Failure> {
    let request = KillAgentRequest {
        sandbox_id: agent.id.clone(),
        session_id: agent.session.clone(),
        signal: Some(signal),
    };
    connection.agents().kill_agent(within(CALL_TIMEOUT, request)).await?;
    Ok(())
}

fn exit_code(ended: Ended) -> u8 {
    match ended {
        Ended::Done => 0,
        Ended::Failed => FAILED,
        Ended::Interrupted => INTERRUPTED,
        Ended::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
    }
}

fn table(agents: &[AgentSession], now: Timestamp) -> String {
    let rows = agents.iter().map(|agent| {
        let status = match agent.exit_code {
            None if agent.running => "running".to_owned(),
            code => format!("exited {}", code.unwrap_or_default()),
        };
        let age = agent.started_at.map(|at| age(at.seconds, now)).unwrap_or_default();
        [agent.session_id.clone(), status, age]
    });
    output::table(["ID", "STATUS", "AGE"], rows)
}
