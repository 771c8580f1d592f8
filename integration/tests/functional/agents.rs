//! Agents: the Claude Agent SDK in a microVM, talking to a scripted API there.

use std::{collections::HashMap, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use oc_integration::{
    mesh::{Mesh, PATIENCE},
    messages_api,
    rest::Sandbox,
};
use oc_proto::v1::{
    AgentEvent, AttachAgentRequest, AttachAgentResponse, InterruptAgentRequest, ListAgentsRequest,
    PromptAgentRequest, StartAgentRequest, agent_session_service_client::AgentSessionServiceClient,
    attach_agent_response::Event,
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

/// Agents of one sandbox, by gRPC through the gateway.
#[derive(Clone)]
struct Agents {
    client: AgentSessionServiceClient<Channel>,
    key: String,
    sandbox_id: String,
    envs: HashMap<String, String>,
}

/// An agent, and its events as they come.
struct Agent {
    agents: Agents,
    id: String,
    stream: Streaming<AttachAgentResponse>,
    /// All events until now.
    heard: Vec<AgentEvent>,
}

impl Agents {
    /// Of a sandbox of its own, with the scripted API.
    async fn create(mesh: &Mesh) -> anyhow::Result<(Sandbox, Self)> {
        let sandbox = mesh.rest().create(json!({})).await?;
        let envs = messages_api::start(&sandbox).await?;
        let channel = Channel::from_shared(mesh.url.clone())?.connect().await?;
        let client = AgentSessionServiceClient::new(channel);
        let agents = Self { client, key: mesh.key.clone(), sandbox_id: sandbox.id.clone(), envs };
        Ok((sandbox, agents))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("x-api-key", self.key.parse().expect("a key is ASCII"));
        request
    }

    async fn start(&self, request: StartAgentRequest) -> anyhow::Result<Agent> {
        let (sandbox_id, envs) = (self.sandbox_id.clone(), self.envs.clone());
        let request = self.request(StartAgentRequest { sandbox_id, envs, ..request });
        let started = self.client.clone().start_agent(request).await?.into_inner();
        self.attach(&started.session.context("no session")?.session_id).await
    }

    async fn attach(&self, id: &str) -> anyhow::Result<Agent> {
        let stream = self.attach_at(id, 0).await?;
        Ok(Agent { agents: self.clone(), id: id.into(), stream, heard: Vec::new() })
    }

    async fn attach_at(&self, id: &str, offset: u64) -> Result<Streaming<AttachAgentResponse>, Status> {
        let (sandbox_id, session_id) = (self.sandbox_id.clone(), id.to_owned());
        let request = self.request(AttachAgentRequest { sandbox_id, session_id, offset });
        Ok(self.client.clone().attach_agent(request).await?.into_inner())
    }

    async fn prompt(&self, id: &str, text: &str) -> Result<(), Status> {
        let (sandbox_id, session_id) = (self.sandbox_id.clone(), id.to_owned());
        let request = self.request(PromptAgentRequest { sandbox_id, session_id, text: text.into() });
        self.client.clone().prompt_agent(request).await.map(drop)
    }
}

impl Agent {
    async fn prompt(&self, text: &str) -> anyhow::Result<()> {
        Ok(self.agents.prompt(&self.id, text).await?)
    }

    async fn interrupt(&self) -> anyhow::Result<()> {
        let (sandbox_id, session_id) = (self.agents.sandbox_id.clone(), self.id.clone());
        let request = self.agents.request(InterruptAgentRequest { sandbox_id, session_id });
        self.agents.client.clone().interrupt_agent(request).await?;
        Ok(())
    }

    /// The next event of this type; those before it are heard, too.
    async fn until(&mut self, kind: &str) -> anyhow::Result<Value> {
        loop {
            let event = match next(&mut self.stream).await? {
                Some(Event::Agent(event)) => event,
                other => bail!("{other:?} instead of {kind}, after {:?}", self.kinds()),
            };
            let value: Value = serde_json::from_str(&event.json)?;
            ensure!(value["type"] == event.r#type, "{event:?}");
            let is_it = event.r#type == kind;
            self.heard.push(event);
            if is_it {
                return Ok(value);
            }
        }
    }

    /// Prompts, and waits for the end of the turn: how it ended, and the text that it ended with.
    async fn ask(&mut self, text: &str) -> anyhow::Result<String> {
        self.prompt(text).await?;
        let result = self.until("result").await?;
        self.until("turn_complete").await?;
        Ok(result["result"].as_str().unwrap_or_default().to_owned())
    }

    /// The steps of all prompts of the conversation, as the API has seen them.
    async fn recall(&mut self) -> anyhow::Result<Vec<String>> {
        Ok(serde_json::from_str(&self.ask("step: recall").await?)?)
    }

    /// Waits until it has ended, by `SIGKILL`.
    async fn gone(&mut self) -> anyhow::Result<()> {
        let exit = loop {
            match next(&mut self.stream).await?.context("no exit")? {
                Event::Exit(exit) => break exit,
                Event::Agent(_) | Event::Dropped(_) => {}
            }
        };
        ensure!(exit.exit_code == 137, "{exit:?}");
        ensure!(next(&mut self.stream).await?.is_none(), "something follows the exit");
        Ok(())
    }

    fn kinds(&self) -> Vec<&str> {
        self.heard.iter().map(|event| event.r#type.as_str()).collect()
    }
}

async fn next(stream: &mut Streaming<AttachAgentResponse>) -> anyhow::Result<Option<Event>> {
    let message = timeout(PATIENCE, stream.message()).await.context("nothing comes")??;
    Ok(message.and_then(|message| message.event))
}

fn prompting(text: &str) -> StartAgentRequest {
    StartAgentRequest { prompt: text.into(), ..Default::default() }
}

pub async fn an_agent_does_what_it_is_told(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let told =
        "step: write made.txt by an agent\nstep: run cat made.txt; echo; pwd; id -un\nstep: say that is all";
    let mut agent =
        agents.start(StartAgentRequest { model: Some("claude-scripted".into()), ..prompting(told) }).await?;
    agent.until("turn_complete").await?;
    assert_eq!(agent.kinds()[..2], ["ready", "configured"]);
    let said: Vec<Value> =
        agent.heard.iter().map(|event| serde_json::from_str(&event.json)).collect::<Result<_, _>>()?;
    let init = said.iter().find(|event| event["subtype"] == "init").context("no init")?;
    assert_eq!(
        (&init["model"], &init["permissionMode"]),
        (&json!("claude-scripted"), &json!("bypassPermissions"))
    );
    let results: Vec<&Value> = said
        .iter()
        .filter(|event| event["type"] == "user")
        .map(|event| &event["message"]["content"][0])
        .collect();
    assert_eq!(
        results.last().context("no result of a tool")?["content"],
        "by an agent\n/home/sandbox\nsandbox"
    );
    assert_eq!(sandbox.run("cat made.txt").await?.trim_end(), "by an agent");

    // The conversation goes on, in the same process.
    assert_eq!(agent.recall().await?.last().map(String::as_str), Some("recall"));
    assert_eq!(agent.recall().await?.len(), 5);

    // It is a session like any other, and its events come again from wherever one left off.
    let listed = mesh.rest().get(&sandbox.path("/agent")).await?.expect(200)?.json();
    assert_eq!((&listed[0]["sessionID"], &listed[0]["running"]), (&json!(agent.id), &json!(true)));
    let session = mesh.rest().get(&sandbox.path(&format!("/exec/{}", agent.id))).await?.expect(200)?.json();
    assert_eq!(session["kind"], "agent", "{session}");
    for begin in [0, 1, agent.heard.len() / 2, agent.heard.len() - 1] {
        let offset = if begin == 0 { 0 } else { agent.heard[begin - 1].next_offset };
        let mut again = agents.attach_at(&agent.id, offset).await?;
        for event in &agent.heard[begin..] {
            assert_eq!(next(&mut again).await?, Some(Event::Agent(event.clone())));
        }
    }
    sandbox.delete().await
}

pub async fn an_agent_that_is_interrupted_waits_for_the_next_prompt(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let mut agent = agents.start(StartAgentRequest::default()).await?;
    agent.until("configured").await?;
    // While it does nothing, amid an answer, and amid a command; prompts that wait are forgotten.
    agent.interrupt().await?;
    agent.until("interrupted").await?;
    for told in ["step: count 3000 100", "step: run touch begun; while :; do sleep 0.2; done"] {
        agent.prompt(told).await?;
        agent.prompt("step: say never").await?;
        agent.until("system").await?;
        if told.contains("begun") {
            oc_integration::mesh::eventually("the command runs", async || {
                ensure!(sandbox.run("ls begun || true").await? == "begun\n");
                Ok(())
            })
            .await?;
        }
        agent.interrupt().await?;
        agent.until("interrupted").await?;
    }
    let recalled = agent.recall().await?;
    assert_eq!(recalled.last().map(String::as_str), Some("recall"), "{recalled:?}");
    assert!(!recalled.iter().any(|step| step.contains("never")), "{recalled:?}");

    // Killed, it takes with it what it has started.
    agent.prompt("step: run while :; do touch alive; sleep 0.2; done").await?;
    oc_integration::mesh::eventually("the command runs", async || {
        ensure!(sandbox.run("ls alive || true").await? == "alive\n");
        Ok(())
    })
    .await?;
    mesh.rest().post(&sandbox.path(&format!("/agent/{}/kill", agent.id)), json!({})).await?.expect(204)?;
    agent.gone().await?;
    assert_eq!(sandbox.run("rm alive; sleep 1; ls alive 2> /dev/null || echo none").await?, "none\n");
    sandbox.delete().await
}

pub async fn an_agent_goes_on_with_an_earlier_conversation(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let mut first = agents.start(prompting("step: say the word is teapot")).await?;
    let init = first.until("system").await?;
    assert_eq!(init["subtype"], "init");
    let conversation = init["session_id"].as_str().context("no session_id")?.to_owned();
    assert_eq!(first.until("turn_complete").await?["claude_session_id"], conversation);
    mesh.rest()
        .post(&sandbox.path(&format!("/agent/{}/kill", first.id)), json!({ "signal": 9 }))
        .await?
        .expect(204)?;
    first.gone().await?;

    let resumed = StartAgentRequest { resume: conversation.clone(), ..prompting("step: recall") };
    let mut second = agents.start(resumed).await?;
    let result = second.until("result").await?["result"].to_string();
    assert!(result.contains("teapot"), "{result}");
    assert_eq!(second.until("turn_complete").await?["claude_session_id"], conversation);

    // One that is not there is told, and another begins.
    let nowhere = "00000000-0000-4000-8000-000000000000";
    let lost = StartAgentRequest { resume: nowhere.into(), ..prompting("step: recall") };
    let mut third = agents.start(lost).await?;
    assert_eq!(third.until("error").await?["code"], "cannot_resume");
    third.until("turn_complete").await?;
    assert_eq!(third.recall().await?, ["recall"]);
    sandbox.delete().await
}

pub async fn an_agent_tells_the_apis_errors_and_goes_on(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let rest = mesh.rest();
    // By REST this time, as the published clients do it.
    let started = json!({ "prompt": "step: fail 401 authentication_error", "envs": agents.envs });
    let started = rest.post(&sandbox.path("/agent"), started).await?.expect(201)?.json();
    let mut agent = agents.attach(started["sessionID"].as_str().context("no sessionID")?).await?;
    let error = agent.until("error").await?;
    assert_eq!((&error["code"], &error["status"]), (&json!("authentication_failed"), &json!(401)), "{error}");
    agent.until("turn_complete").await?;
    let path = sandbox.path(&format!("/agent/{}/prompt", agent.id));
    rest.post(&path, json!({ "text": "step: fail 400 invalid_request_error" })).await?.expect(204)?;
    let error = agent.until("error").await?;
    assert_eq!(error["status"], 400);
    assert!(error["message"].as_str().is_some_and(|text| text.contains("scripted: invalid_request_error")));
    agent.until("turn_complete").await?;
    // What is no command is an error, too, and nothing else.
    agent.prompt("step: say still here").await?;
    assert_eq!(agent.until("result").await?["result"], "still here");
    sandbox.delete().await
}

pub async fn a_wrapper_takes_whatever_it_is_told(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let bad = [
        json!("text"),
        json!({ "type": "nope" }),
        json!({ "type": "prompt" }),
        json!({ "type": "prompt", "text": "" }),
        json!({ "type": "configure", "maxTurns": 0 }),
        json!({ "type": "configure", "permissionMode": "yolo" }),
    ];
    let mut lines = bad.iter().map(|command| format!("{command}\n")).collect::<String>() + "{no JSON\n\n";
    // One that is begun, and more than may wait; then two that the end of the input waits for.
    for number in 0..70 {
        lines += &format!("{}\n", json!({ "type": "prompt", "text": format!("step: say {number}") }));
    }
    lines += "{\"type\":\"interrupt\"}\n";
    for number in 0..2 {
        lines += &format!("{}\n", json!({ "type": "prompt", "text": format!("step: say {number}") }));
    }
    sandbox.put("lines", lines).await?.expect(204)?;
    let script = "{ head -c 8000000 /dev/zero | tr '\\0' x; echo; cat lines; } | claude-agent-wrapper";
    let ran = sandbox.run_with(json!({ "cmd": script, "envs": agents.envs, "timeout": 120 })).await?;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let said: Vec<Value> = ran.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let of = |name: &str, value: &str| said.iter().filter(|event| event[name] == value).count();
    assert_eq!(said[0], json!({ "type": "ready" }));
    assert_eq!((of("code", "bad_command"), of("code", "too_many_prompts")), (8, 5), "{}", ran.stdout);
    assert_eq!((of("type", "interrupted"), of("type", "turn_complete")), (1, 2), "{}", ran.stdout);
    sandbox.delete().await
}

pub async fn an_agent_that_dies_ends_alone(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (sandbox, agents) = Agents::create(&mesh).await?;
    let command = json!({ "cmd": "sh", "args": ["-c", "sleep 600"] });
    let command = mesh.rest().post(&sandbox.path("/exec"), command).await?.expect(201)?.json();
    let command = command["sessionID"].as_str().context("no sessionID")?.to_owned();
    let mut other = agents.start(StartAgentRequest::default()).await?;
    other.until("ready").await?;
    let mut agent = agents.start(prompting("step: count 3000 100")).await?;
    agent.until("system").await?;
    // The newest of the two wrappers.
    sandbox.run("kill -9 $(pgrep -n claude-agent)").await?;
    agent.gone().await?;
    // Nobody goes on with the turn.
    oc_integration::mesh::eventually("the SDK's process is gone", async || {
        ensure!(sandbox.run("pgrep -f claude-agent-sdk-linu[x] || true").await?.is_empty());
        Ok(())
    })
    .await?;
    assert_eq!(agents.prompt(&agent.id, "x").await.unwrap_err().code(), Code::FailedPrecondition);
    // A session that is no agent is none, whatever it is.
    for id in [command.as_str(), "nothing"] {
        assert_eq!(agents.prompt(id, "x").await.unwrap_err().code(), Code::NotFound, "{id}");
    }
    let list = agents.request(ListAgentsRequest { sandbox_id: sandbox.id.clone() });
    let listed = agents.client.clone().list_agents(list).await?.into_inner().sessions;
    assert_eq!(listed.iter().map(|one| one.running).collect::<Vec<_>>(), [true, false]);
    let session = mesh.rest().get(&sandbox.path(&format!("/exec/{command}"))).await?.expect(200)?.json();
    assert_eq!(session["running"], true);
    assert_eq!(other.ask("step: say mine").await?, "mine");
    sandbox.delete().await
}
