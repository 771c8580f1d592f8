//! `oc.v1.NodeService`.

use std::collections::HashMap;

use oc_mesh::{keys, record, store::SharedStore, view::View};
use oc_proto::{
    mesh::{HostRecord, HostReservation},
    v1::{
        ClearNodeRequest, ClearNodeResponse, ListNodesRequest, ListNodesResponse, Node,
        node_service_server::NodeService,
    },
};
use tonic::{Request, Response, Status};

use super::admin_caller;
use crate::{refusal::Refusal, sandboxes::Sandboxes};

/// The service.
#[derive(Clone, Debug)]
pub struct NodeRpc {
    store: SharedStore,
    hosts: View<HostRecord>,
    sandboxes: Sandboxes,
}

impl NodeRpc {
    /// Shows `hosts`, with what `store` says is promised on them, and clears them of `sandboxes`.
    pub fn new(store: SharedStore, hosts: View<HostRecord>, sandboxes: Sandboxes) -> Self {
        Self { store, hosts, sandboxes }
    }
}

#[tonic::async_trait]
impl NodeService for NodeRpc {
    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        admin_caller(&request)?;
        let (promised, _) = record::list::<HostReservation>(self.store.as_ref(), keys::RESERVATIONS)
            .await
            .map_err(Refusal::from)?;
        let promised: HashMap<String, HostReservation> =
            promised.into_iter().map(|(key, promised, _)| (key, promised)).collect();
        let nodes = self.hosts.all().into_iter().map(|(host_id, host)| {
            let promised = promised.get(&keys::reservation(&host_id)).copied().unwrap_or_default();
            Node {
                node_id: host_id,
                accelerator: host.accelerator.clone(),
                vmm: host.vmm.clone(),
                sandboxes: promised.sandboxes,
                max_sandboxes: host.max_sandboxes,
                memory_reserved_mb: promised.memory_mb,
                memory_capacity_mb: host.memory_capacity_mb,
                pool_ready: host.pool_ready,
                version: host.version.clone(),
            }
        });
        Ok(Response::new(ListNodesResponse { nodes: nodes.collect() }))
    }

    async fn clear_node(
        &self,
        request: Request<ClearNodeRequest>,
    ) -> Result<Response<ClearNodeResponse>, Status> {
        admin_caller(&request)?;
        let deleted = self.sandboxes.clear(&request.into_inner().node_id).await?;
        Ok(Response::new(ClearNodeResponse { sandboxes: i32::try_from(deleted).unwrap_or(i32::MAX) }))
    }
}
