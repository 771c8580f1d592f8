//! Whether the tests of sandboxes can be run with this driver here: `make test-kvm` does, and must not where no guest boots.

use std::{io::Write as _, path::Path};

use oc_integration::{firecracker::settings, prepared};
use oc_vmm_agent::driver::{firecracker::probe, template};

#[tokio::test]
async fn it_is_said_whether_guests_boot_here() {
    let templates = template::find(Path::new(prepared::IMAGES)).unwrap();
    let kernel = templates.first().map(template::Template::kernel);
    let said = match probe::boots(&settings(), kernel.as_deref()).await {
        Ok(()) => "guests boot under Firecracker here: `make test-kvm` runs the tests of sandboxes with it"
            .to_owned(),
        Err(reason) => {
            let not_seen = format!(
                "no guest boots under Firecracker here ({reason}): what sandboxes do under it is NOT TESTED"
            );
            assert!(std::env::var_os("OC_GUESTS_BOOT").is_none(), "{not_seen}");
            not_seen
        }
    };
    // Past what catches the output of tests that pass.
    writeln!(std::io::stderr().lock(), "\n{said}\n").unwrap();
}
