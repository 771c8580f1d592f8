//! What callers see: the public services, one file each. Here requests are parsed, callers checked and answers built;
//! what is done stands elsewhere.

use oc_mesh::caller::Caller;
use tonic::Request;

use crate::refusal::Refusal;

pub mod checkpoints;
pub mod file_urls;
pub mod keys;
pub mod nodes;
pub mod present;
pub mod previews;
pub mod sandboxes;
pub mod watch;

/// Who calls, as the gateway has verified.
fn caller<T>(request: &Request<T>) -> Result<Caller, Refusal> {
    Caller::from_headers(request.metadata().as_ref()).map_err(|error| Refusal::NoCaller(error.to_string()))
}

/// Who calls, if it is somebody with an API key.
fn key_caller<T>(request: &Request<T>) -> Result<Caller, Refusal> {
    let caller = caller(request)?;
    if caller.sandbox.is_some() { Err(Refusal::WrongSandbox) } else { Ok(caller) }
}

/// Who calls, if it is an administrator.
fn admin_caller<T>(request: &Request<T>) -> Result<Caller, Refusal> {
    let caller = key_caller(request)?;
    if caller.admin { Ok(caller) } else { Err(Refusal::NotAdmin) }
}

/// Who calls, if it may use this sandbox: with any key, or with this sandbox's token.
fn sandbox_caller<T>(request: &Request<T>, sandbox_id: &str) -> Result<Caller, Refusal> {
    let caller = caller(request)?;
    match &caller.sandbox {
        Some(own) if own != sandbox_id => Err(Refusal::WrongSandbox),
        _ => Ok(caller),
    }
}
