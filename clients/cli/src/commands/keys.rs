//! `oc keys`.

use jiff::Timestamp;
use oc_proto::v1::{CreateKeyRequest, DeleteKeyRequest, Key, ListKeysRequest};

use crate::{
    arguments::KeysCommand,
    commands::sandboxes::age,
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
};

/// `oc keys …`.
pub async fn run(connection: &Connection, command: KeysCommand, output: Output) -> Result<(), Failure> {
    let mut keys = connection.keys();
    match command {
        KeysCommand::Create { tenant, admin, description } => {
            let request = CreateKeyRequest {
                tenant: tenant.unwrap_or_default(),
                admin,
                description: description.unwrap_or_default(),
            };
            let created = keys.create_key(within(CALL_TIMEOUT, request)).await?.into_inner();
            if let (false, Some(key)) = (output.is_json(), &created.key) {
                output::note(format_args!(
                    "key {} of tenant {}; it is shown only now:",
                    key.key_id, key.tenant
                ));
            }
            output.show(|| json::of(&created), || created.api_key.clone())
        }
        KeysCommand::List => {
            let keys = keys.list_keys(within(CALL_TIMEOUT, ListKeysRequest {})).await?.into_inner().keys;
            output.show(|| json::list(&keys), || table(&keys, Timestamp::now()))
        }
        KeysCommand::Delete { key_id } => {
            keys.delete_key(within(CALL_TIMEOUT, DeleteKeyRequest { key_id })).await?;
            output.done()
        }
    }
}

fn table(keys: &[Key], now: Timestamp) -> String {
    let rows = keys.iter().map(|key| {
        [
            key.key_id.clone(),
            key.tenant.clone(),
            if key.admin { "yes" } else { "no" }.to_owned(),
            key.created_at.map(|created| age(created.seconds, now)).unwrap_or_default(),
            key.description.clone(),
        ]
    });
    output::table(["ID", "TENANT", "ADMIN", "AGE", "DESCRIPTION"], rows)
}
