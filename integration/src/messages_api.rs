//! The Messages API in a sandbox, scripted: what it answers stands in the prompt (`messages_api.py`). Only the model is
//! left out; the SDK and what it runs are the real ones.

use std::collections::HashMap;

use anyhow::Context as _;

use crate::rest::Sandbox;

const SCRIPT: &str = include_str!("messages_api.py");
const PORT: u16 = 8099;

/// Starts it in `sandbox`; the environment of an agent there.
///
/// # Errors
///
/// If it does not come up.
pub async fn start(sandbox: &Sandbox) -> anyhow::Result<HashMap<String, String>> {
    sandbox.put(".messages_api.py", SCRIPT).await?.expect(204)?;
    let script = format!(
        "nohup python3 .messages_api.py {PORT} > .messages_api.log 2>&1 &
         for _ in $(seq 300); do curl -fsI http://127.0.0.1:{PORT}/ > /dev/null && exit 0; sleep 0.1; done
         cat .messages_api.log; exit 1"
    );
    sandbox.run(&script).await.context("the scripted Messages API does not answer")?;
    let envs = [
        ("ANTHROPIC_BASE_URL", format!("http://127.0.0.1:{PORT}")),
        ("ANTHROPIC_API_KEY", "sk-ant-scripted".into()),
    ];
    Ok(envs.map(|(name, value)| (name.to_owned(), value)).into())
}
