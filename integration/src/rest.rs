//! The REST API as a client without any of our code sees it.

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

/// A client with one key.
#[derive(Clone, Debug)]
pub struct Rest {
    http: reqwest::Client,
    url: String,
    key: String,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body, as it came.
    pub body: Bytes,
    /// Headers by name.
    pub headers: reqwest::header::HeaderMap,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// An error's stable code.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Status and code of an error, for one comparison.
    pub fn refusal(&self) -> (u16, String) {
        (self.status, self.code())
    }

    /// Itself, if it has this status.
    ///
    /// # Errors
    ///
    /// If it has another: with the body's text.
    pub fn expect(self, status: u16) -> anyhow::Result<Self> {
        let text = String::from_utf8_lossy(&self.body);
        ensure!(self.status == status, "{} instead of {status}: {text}", self.status);
        Ok(self)
    }
}

impl Rest {
    /// Its key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// A client of the gateway at `url`.
    pub fn new(url: &str, key: &str) -> Self {
        Self { http: reqwest::Client::new(), url: url.trim_end_matches('/').into(), key: key.into() }
    }

    /// A request with this client's key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.anonymous(method, path).header("x-api-key", &self.key)
    }

    /// A request without credentials.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// Sends it and reads the whole answer.
    ///
    /// # Errors
    ///
    /// If there is no whole answer.
    pub async fn send(&self, request: RequestBuilder) -> anyhow::Result<Answer> {
        let answer = request.send().await.context("no answer")?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Ok(Answer { status, headers, body: answer.bytes().await.context("half an answer")? })
    }

    /// GET.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(self.request(Method::GET, path)).await
    }

    /// POST with a JSON body.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn post(&self, path: &str, body: Value) -> anyhow::Result<Answer> {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    /// DELETE.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn delete(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Creates a sandbox.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub async fn create(&self, body: Value) -> anyhow::Result<Sandbox> {
        let facts = self.post("/api/sandboxes", body).await?.expect(201)?.json();
        let id = facts["sandboxID"].as_str().context("no sandboxID")?.to_owned();
        Ok(Sandbox { rest: self.clone(), id, facts })
    }

    /// A handle to a sandbox that is there.
    pub fn sandbox(&self, id: &str) -> Sandbox {
        Sandbox { rest: self.clone(), id: id.into(), facts: Value::Null }
    }

    /// The IDs of all sandboxes.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn list(&self) -> anyhow::Result<Vec<String>> {
        let listed = self.get("/api/sandboxes?pageSize=1000").await?.expect(200)?.json();
        let ids = listed.as_array().context("no array")?.iter();
        Ok(ids.filter_map(|one| Some(one["sandboxID"].as_str()?.to_owned())).collect())
    }
}

/// A sandbox, by REST.
#[derive(Clone, Debug)]
pub struct Sandbox {
    rest: Rest,
    /// Its ID.
    pub id: String,
    /// What the create answered; null for one that was there.
    pub facts: Value,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Exit code.
    pub code: i64,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// All of the answer.
    pub all: Value,
}

impl Sandbox {
    /// The path of one of its routes.
    pub fn path(&self, rest: &str) -> String {
        format!("/api/sandboxes/{}{rest}", self.id)
    }

    /// What is known of it.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn get(&self) -> anyhow::Result<Answer> {
        self.rest.get(&self.path("")).await
    }

    /// Asks for a command.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn exec(&self, body: Value) -> anyhow::Result<Answer> {
        self.rest.post(&self.path("/exec/run"), body).await
    }

    /// Runs a command that starts.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub async fn run_with(&self, body: Value) -> anyhow::Result<Ran> {
        let all = self.exec(body).await?.expect(200)?.json();
        let text = |name: &str| all[name].as_str().unwrap_or_default().to_owned();
        let code = all["exitCode"].as_i64().with_context(|| format!("no exitCode in {all}"))?;
        Ok(Ran { code, stdout: text("stdout"), stderr: text("stderr"), all })
    }

    /// Runs a script that succeeds; what it prints.
    ///
    /// # Errors
    ///
    /// If it fails: with what it says.
    pub async fn run(&self, script: &str) -> anyhow::Result<String> {
        let ran = self.run_with(json!({ "cmd": script })).await?;
        ensure!(ran.code == 0, "{script}: {}: {}{}", ran.code, ran.stdout, ran.stderr);
        Ok(ran.stdout)
    }

    /// Runs a script as root that succeeds; what it prints.
    ///
    /// # Errors
    ///
    /// If it fails: with what it says.
    pub async fn run_as_root(&self, script: &str) -> anyhow::Result<String> {
        let ran = self.run_with(json!({ "cmd": script, "user": "root" })).await?;
        ensure!(ran.code == 0, "{script}: {}: {}{}", ran.code, ran.stdout, ran.stderr);
        Ok(ran.stdout)
    }

    /// A request for one of its files.
    pub fn file(&self, method: Method, rest: &str, path: &str) -> RequestBuilder {
        self.rest.request(method, &self.path(rest)).query(&[("path", path)])
    }

    /// Writes a file.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn put(&self, path: &str, content: impl Into<reqwest::Body>) -> anyhow::Result<Answer> {
        self.rest.send(self.file(Method::PUT, "/files", path).body(content)).await
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn read(&self, path: &str) -> anyhow::Result<Answer> {
        self.rest.send(self.file(Method::GET, "/files", path)).await
    }

    /// Sends a request for one of its files.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn files(&self, method: Method, rest: &str, path: &str) -> anyhow::Result<Answer> {
        self.rest.send(self.file(method, rest, path)).await
    }

    /// Deletes it.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub async fn delete(&self) -> anyhow::Result<()> {
        self.rest.delete(&self.path("")).await?.expect(204).map(drop)
    }
}
