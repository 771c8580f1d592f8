//! `oc`: see the library.

fn main() -> std::process::ExitCode {
    oc_cli::main()
}
