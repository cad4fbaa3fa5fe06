//! `cargo bench --bench engine [-- --json]`: what `infill bench engine` measures, and memory allocations counted.

use std::process::ExitCode;

use infill::lab::bench::engine;

#[path = "common/counting.rs"]
mod counting;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.iter().position(|arg| arg == "--pass") {
        Some(at) => engine::pass_of(&args[at + 1..]),
        None => engine::measure(Some(counting::allocations), &["--pass"], &[]).map(|report| {
            print!("{}", report.table());
            if args.iter().any(|arg| arg == "--json") {
                println!("{}", serde_json::to_string(&report).unwrap_or_default());
            }
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infill: {error}");
            ExitCode::FAILURE
        }
    }
}
