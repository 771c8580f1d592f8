//! Every key of the store, built in one place. What lies under each is said in `proto/oc/mesh/v1/records.proto`.

/// Prefix of all sandboxes.
pub const SANDBOXES: &str = "sandboxes/";
/// Prefix of all checkpoints.
pub const CHECKPOINTS: &str = "checkpoints/";
/// Prefix of what checkpoints each sandbox has.
pub const CHECKPOINT_INDEX: &str = "checkpoint-index/";
/// Prefix of whose host names of previews are.
pub const PREVIEW_DOMAINS: &str = "preview-domains/";
/// Prefix of all hosts that are members.
pub const HOSTS: &str = "members/hosts/";
/// Prefix of all gateways that are members.
pub const GATEWAYS: &str = "members/gateways/";
/// Prefix of all schedulers that are members.
pub const SCHEDULERS: &str = "members/schedulers/";
/// Prefix of what is promised on hosts.
pub const RESERVATIONS: &str = "reservations/";
/// Prefix of what tenants use.
pub const USAGE: &str = "usage/";
/// Prefix of all API keys.
pub const API_KEYS: &str = "keys/";
/// Prefix of the private keys that sign tokens.
pub const TOKEN_SIGNING: &str = "token-signing/";
/// Prefix of the public keys that verify tokens.
pub const TOKEN_VERIFY: &str = "token-verify/";

macro_rules! key {
    ($(#[$doc:meta])* $name:ident, $prefix:ident) => {
        $(#[$doc])*
        pub fn $name(id: &str) -> String {
            format!("{}{id}", $prefix)
        }
    };
}

key!(
    /// A sandbox's record.
    sandbox, SANDBOXES
);
key!(
    /// A checkpoint's record.
    checkpoint, CHECKPOINTS
);
key!(
    /// What checkpoints a sandbox has.
    checkpoint_index, CHECKPOINT_INDEX
);
key!(
    /// Whose a host name is.
    preview_domain, PREVIEW_DOMAINS
);
key!(
    /// A host's membership.
    host, HOSTS
);
key!(
    /// A gateway's membership.
    gateway, GATEWAYS
);
key!(
    /// A scheduler's membership.
    scheduler, SCHEDULERS
);
key!(
    /// What is promised on a host.
    reservation, RESERVATIONS
);
key!(
    /// What a tenant uses.
    usage, USAGE
);
key!(
    /// An API key, by its hash.
    api_key, API_KEYS
);
key!(
    /// A private key, by its ID.
    token_signing, TOKEN_SIGNING
);
key!(
    /// A public key, by its ID.
    token_verify, TOKEN_VERIFY
);
