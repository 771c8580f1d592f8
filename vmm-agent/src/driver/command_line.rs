//! What every guest's kernel is told, whichever VMM boots it.

use crate::network::plan;

/// The part of the kernel's command line that is about the guest and not about its machine; it begins with a space.
pub fn of_guest(has_network: bool) -> String {
    // What every switch of tasks and every exec would pay for, and a guest without policies has no use for: accounting of
    // stalls, and security modules beside those that its own programs use.
    let mut line = String::from(" psi=0 lsm=landlock,yama");
    if has_network {
        let mac = plan::GATEWAY_MAC.map(|byte| format!("{byte:02x}")).join(":");
        line.push_str(&format!(
            " oc.net={}/30,{} oc.net={}/64,{} oc.gateway-mac={mac} oc.dns={}",
            plan::GUEST,
            plan::GATEWAY,
            plan::GUEST6,
            plan::GATEWAY6,
            plan::DNS
        ));
    }
    line
}
