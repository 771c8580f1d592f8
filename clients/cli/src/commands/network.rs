//! `oc network`: how sandboxes are connected.

use oc_proto::v1::{GetNetworkRequest, Network};

use crate::{
    arguments::NetworkCommand,
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
};

/// `oc network`.
pub async fn run(connection: &Connection, command: NetworkCommand, output: Output) -> Result<(), Failure> {
    let NetworkCommand::Show(one) = command;
    let request = within(CALL_TIMEOUT, GetNetworkRequest { sandbox_id: one.id });
    let answer = connection.networks().get_network(request).await?.into_inner();
    let network = answer.network.unwrap_or_default();
    output.show(|| json::of(&network), || details(&network))
}

fn details(network: &Network) -> String {
    let egress = json::enum_word("EgressPolicy", network.egress().as_str_name());
    if !network.is_connected {
        return output::pairs([("network", "none".to_owned()), ("egress", egress)]);
    }
    output::pairs([
        ("egress", egress),
        ("address", network.addresses.join(" ")),
        ("gateway", network.gateways.join(" ")),
        ("names", network.name_server.clone()),
        ("mac", network.mac.clone()),
        ("connections", format!("{} of {}", network.connections, network.max_connections)),
        ("limit", format!("{} Mbit/s each way", network.max_mbit)),
        ("sent", format!("{} B", network.sent_bytes)),
        ("received", format!("{} B", network.received_bytes)),
    ])
}
