//! Sandboxes are clones of one snapshot, and must not show it.

use std::{collections::HashSet, sync::Arc};

use oc_integration::mesh::Mesh;
use serde_json::json;

use crate::hibernation;

pub async fn clones_are_strangers_to_each_other(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    // Of the pool, and more than the pool holds: both ways to make a clone.
    let mut sandboxes = Vec::new();
    for _ in 0..4 {
        sandboxes.push(mesh.rest().create(json!({})).await?);
    }
    let mut seen = HashSet::new();
    for sandbox in &sandboxes {
        for secret in [
            "cat /etc/machine-id",
            "head -c 16 /dev/urandom | od -An -tx1",
            "python3 -c 'import os; print(os.getrandom(16).hex())'",
            "python3 -c 'import uuid; print(uuid.uuid4())'",
            "cat /proc/sys/kernel/random/uuid",
        ] {
            let value = sandbox.run(secret).await?;
            assert!(value.trim().len() >= 32, "{secret}: {value}");
            assert!(seen.insert(value.clone()), "two clones have the same {secret}: {value}");
        }
        // What one writes, no other sees.
        assert_eq!(sandbox.run("ls -A /var/tmp").await?, "");
        sandbox.run("echo mine > /var/tmp/secret; sudo sh -c 'echo changed >> /etc/hosts'").await?;
    }
    for sandbox in sandboxes {
        assert_eq!(sandbox.run("grep -c changed /etc/hosts").await?, "1\n");
        sandbox.delete().await?;
    }
    Ok(())
}

pub async fn a_clone_knows_the_time(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    hibernation::knows_the_time(&sandbox).await?;
    sandbox.delete().await
}
