//! What the public may call: every RPC of `oc.v1`, who may call it, and which of our parts answers it.
//!
//! The table below names services, not RPCs: an RPC that is added to a service listed here is served with that
//! service's rule from then on. A service that is not listed stops the gateway from starting, so that nothing
//! becomes public by accident.

use std::{collections::HashMap, sync::Arc};

use http::{StatusCode, uri::PathAndQuery};
use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MethodDescriptor};

/// The package that the public sees.
const PACKAGE: &str = "oc.v1";

/// The field by which a request names its sandbox.
const SANDBOX_FIELD: &str = "sandbox_id";

/// Who may call an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Holders of an administrator's API key.
    Admin,
    /// Holders of any API key.
    Tenant,
    /// Holders of any API key, and of a token for the sandbox that the request names.
    Sandbox,
}

/// Which of our parts answers an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Any scheduler.
    Scheduler,
    /// The host that the sandbox runs on.
    Host,
}

/// Services of the contract.
const SERVICES: &[(&str, Access, Backend)] = &[
    ("AgentSessionService", Access::Sandbox, Backend::Host),
    ("CheckpointService", Access::Tenant, Backend::Scheduler),
    ("ExecService", Access::Sandbox, Backend::Host),
    ("FileService", Access::Sandbox, Backend::Host),
    ("FileUrlService", Access::Sandbox, Backend::Scheduler),
    ("KeyService", Access::Admin, Backend::Scheduler),
    ("NetworkService", Access::Sandbox, Backend::Host),
    ("NodeService", Access::Admin, Backend::Scheduler),
    ("PortService", Access::Sandbox, Backend::Host),
    ("PreviewService", Access::Tenant, Backend::Scheduler),
    ("SandboxService", Access::Tenant, Backend::Scheduler),
];

/// RPCs of a service for tenants that a sandbox's token is enough for, too.
const TOKEN_SUFFICES: &[&str] = &[
    "oc.v1.SandboxService.GetSandbox",
    "oc.v1.SandboxService.HibernateSandbox",
    "oc.v1.SandboxService.RefreshToken",
    "oc.v1.SandboxService.SetTimeout",
    "oc.v1.SandboxService.WakeSandbox",
    "oc.v1.SandboxService.WatchSandbox",
];

/// RPCs that change what requests to a sandbox's ports go by.
const CHANGE_PREVIEWS: &[&str] = &[
    "oc.v1.PreviewService.CreatePreview",
    "oc.v1.PreviewService.DeletePreview",
    "oc.v1.PreviewService.RotatePreviewAuth",
];

/// Why the contract cannot be served. Found at start: a fault of the build, not of its surroundings.
#[derive(Debug, thiserror::Error)]
pub enum SurfaceError {
    /// The descriptor set cannot be read.
    #[error("the descriptor set is damaged: {0}")]
    Descriptors(#[from] prost_reflect::DescriptorError),
    /// An option that REST needs is not in the descriptor set.
    #[error("the descriptor set lacks the option `{0}`")]
    MissingOption(&'static str),
    /// Nobody decided who may call this service.
    #[error("service `{0}` is in the contract but not in the gateway's table of services")]
    UnlistedService(String),
    /// A token or a host is chosen by a field that this request does not have.
    #[error("`{0}` acts on a sandbox but its request has no string field `sandbox_id`")]
    NoSandboxField(String),
    /// An HTTP rule that cannot be served.
    #[error("the HTTP rule of `{rpc}` cannot be served: {problem}")]
    Rule {
        /// Full name of the RPC.
        rpc: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// One RPC that the public may call.
#[derive(Debug)]
pub struct Rpc {
    /// Its descriptor.
    pub method: MethodDescriptor,
    /// Its gRPC path, `/oc.v1.ExecService/Run`.
    pub path: PathAndQuery,
    /// Who may call it.
    pub access: Access,
    /// Who answers it.
    pub backend: Backend,
    /// The field of the request that names the sandbox, where there is one.
    pub sandbox_field: Option<FieldDescriptor>,
    /// Whether it changes what requests to the sandbox's ports go by.
    pub changes_previews: bool,
    /// HTTP status of a successful answer.
    pub success: StatusCode,
}

/// The public part of the contract.
#[derive(Debug)]
pub struct Surface {
    pool: DescriptorPool,
    rpcs: HashMap<String, Arc<Rpc>>,
}

impl Surface {
    /// Reads the contract that this binary was built with.
    ///
    /// # Errors
    /// The contract holds something that this gateway has no rule for.
    pub fn load() -> Result<Self, SurfaceError> {
        Self::from_pool(DescriptorPool::decode(oc_proto::DESCRIPTORS)?)
    }

    /// Reads a contract.
    ///
    /// # Errors
    /// It holds something that this gateway has no rule for.
    pub fn from_pool(pool: DescriptorPool) -> Result<Self, SurfaceError> {
        let http_status = pool
            .get_extension_by_name("oc.v1.http_status")
            .ok_or(SurfaceError::MissingOption("oc.v1.http_status"))?;
        let mut rpcs = HashMap::new();
        for service in pool.services().filter(|service| service.package_name() == PACKAGE) {
            let &(_, access, backend) = SERVICES
                .iter()
                .find(|(name, ..)| *name == service.name())
                .ok_or_else(|| SurfaceError::UnlistedService(service.full_name().to_owned()))?;
            for method in service.methods() {
                let options = method.options();
                let status = options.get_extension(&http_status).as_i32().unwrap_or_default();
                let rpc = Rpc::new(method, access, backend, status)?;
                rpcs.insert(rpc.path.as_str().to_owned(), Arc::new(rpc));
            }
        }
        Ok(Self { pool, rpcs })
    }

    /// The whole contract, the internal part included.
    #[must_use]
    pub fn pool(&self) -> &DescriptorPool {
        &self.pool
    }

    /// Every public RPC, in no order.
    pub fn rpcs(&self) -> impl Iterator<Item = &Arc<Rpc>> {
        self.rpcs.values()
    }

    /// The RPC with this gRPC path.
    #[must_use]
    pub fn find(&self, path: &str) -> Option<&Arc<Rpc>> {
        self.rpcs.get(path)
    }
}

impl Rpc {
    fn new(
        method: MethodDescriptor,
        access: Access,
        backend: Backend,
        status: i32,
    ) -> Result<Self, SurfaceError> {
        let name = method.full_name().to_owned();
        let rule = |problem: String| SurfaceError::Rule { rpc: name.clone(), problem };
        let access = if TOKEN_SUFFICES.contains(&method.full_name()) { Access::Sandbox } else { access };
        let sandbox_field =
            method.input().get_field_by_name(SANDBOX_FIELD).filter(|field| field.kind() == Kind::String);
        let changes_previews = CHANGE_PREVIEWS.contains(&method.full_name());
        if sandbox_field.is_none()
            && (access == Access::Sandbox || backend == Backend::Host || changes_previews)
        {
            return Err(SurfaceError::NoSandboxField(name));
        }
        let success = match status {
            0 => StatusCode::OK,
            code => u16::try_from(code)
                .ok()
                .and_then(|code| StatusCode::from_u16(code).ok())
                .filter(StatusCode::is_success)
                .ok_or_else(|| rule(format!("{code} is no HTTP status of success")))?,
        };
        let path =
            PathAndQuery::try_from(format!("/{}/{}", method.parent_service().full_name(), method.name()))
                .map_err(|error| rule(error.to_string()))?;
        Ok(Self { method, path, access, backend, sandbox_field, changes_previews, success })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_loads_and_knows_who_may_call_what() {
        let surface = Surface::load().unwrap();
        let access = |path: &str| surface.find(path).map(|rpc| (rpc.access, rpc.backend));
        assert_eq!(access("/oc.v1.ExecService/Run"), Some((Access::Sandbox, Backend::Host)));
        assert_eq!(access("/oc.v1.FileService/WriteFile"), Some((Access::Sandbox, Backend::Host)));
        assert_eq!(access("/oc.v1.SandboxService/CreateSandbox"), Some((Access::Tenant, Backend::Scheduler)));
        assert_eq!(access("/oc.v1.SandboxService/DeleteSandbox"), Some((Access::Tenant, Backend::Scheduler)));
        assert_eq!(access("/oc.v1.SandboxService/RefreshToken"), Some((Access::Sandbox, Backend::Scheduler)));
        assert_eq!(access("/oc.v1.SandboxService/WatchSandbox"), Some((Access::Sandbox, Backend::Scheduler)));
        assert_eq!(access("/oc.v1.KeyService/CreateKey"), Some((Access::Admin, Backend::Scheduler)));
        assert_eq!(access("/oc.mesh.v1.AgentService/CreateVm"), None);
        assert_eq!(surface.find("/oc.v1.SandboxService/CreateSandbox").unwrap().success, 201);
        assert_eq!(surface.find("/oc.v1.ExecService/Run").unwrap().success, 200);
    }

    #[test]
    fn every_rpc_that_is_named_here_exists() {
        let surface = Surface::load().unwrap();
        for name in TOKEN_SUFFICES.iter().chain(CHANGE_PREVIEWS) {
            assert!(surface.rpcs().any(|rpc| rpc.method.full_name() == *name), "{name} is gone");
        }
    }
}
