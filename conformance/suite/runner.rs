//! Replays the transcripts in `conformance/transcripts`, and those in PROTOCOL.md, against a linechat
//! server.
//!
//!     make conformance                        the server of this repository, one for each transcript
//!     make conformance SERVER=localhost:9999  any linechat/1 server that is running and empty
//!     make conformance SERVER=… SLOW=1        its time-outs and limits too, in a few minutes
//!     make conformance VIA=nc                 every client is a real nc (or telnet) process
//!     make conformance ONLY=private           only the transcripts with this in their name
//!
//! `conformance/README.md` describes the language of transcripts. From here the files are:
//!
//! - `script.rs` reads a transcript: its lines by the table in `steps.rs`, their texts by `text.rs`;
//! - `probe.rs` takes a first look at the server;
//! - `theatre.rs` says which transcripts can be played to it, and in which ways;
//! - `stage.rs` plays one. Its methods are those of the steps (`steps.rs`; `pace.rs`, where time
//!   matters; `terminal.rs` with `screen.rs`, for linechat-client) and of `fences.rs`, which prove
//!   that something does not come; `patience.rs` says how long to wait where they cannot;
//! - `clients.rs` has those who talk to the server, `process.rs` the server's process, `grammar.rs`
//!   what a server may send at all;
//! - `report.rs` tells what came of it;
//! - `broken.rs` breaks a server on purpose, to see that the suite notices.

/// Prints a line. Whoever reads it may have gone, as `head` does.
macro_rules! print_line {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}

mod broken;
mod clients;
mod fences;
mod grammar;
mod pace;
mod patience;
mod probe;
mod process;
mod report;
mod screen;
mod script;
mod stage;
mod steps;
mod terminal;
mod text;
mod theatre;

use broken::Proxy;
use patience::Patience;
use probe::Verdict;
use report::Report;
use script::Script;
use stage::Stage;
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use theatre::{Outcome, Theatre, Way, TOO_LATE};

/// Transcripts played at the same time. They mostly wait, so more than there are processors.
const PLAYED_AT_ONCE: usize = 8;
const AS_WRITTEN: &[Way] = &[Way::AsWritten];

#[derive(Default)]
struct Options {
    theatre: Theatre,
    only: Option<String>,
    /// What passes is told too.
    is_verbose: bool,
}

fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { is_verbose: std::io::stdout().is_terminal(), ..Options::default() };
    let mut arguments = arguments.filter(|argument| !argument.is_empty());
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--server" => options.theatre.server = Some(value()?),
            "--via" => options.theatre.via = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            "--slow" => options.theatre.slow = true,
            "-v" => options.is_verbose = true,
            _ => {
                return Err(format!(
                    "there is no option {option}: --server, --via, --only, --slow or -v"
                ))
            }
        }
    }
    Ok(options)
}

/// Every transcript, by name: the files here and the examples in PROTOCOL.md.
fn load_scripts(only: Option<&str>) -> Result<Vec<Script>, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/transcripts");
    let listing = std::fs::read_dir(&folder).map_err(|error| error.to_string())?;
    let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(".txt")).collect();
    names.sort();
    let mut scripts = Vec::new();
    for name in names {
        scripts.push(Script::from_file(&name, &read(&format!("conformance/transcripts/{name}"))?)?);
    }
    scripts.extend(Script::from_document("PROTOCOL.md", &read("PROTOCOL.md")?)?);
    scripts.retain(|script| only.is_none_or(|only| script.name.contains(only)));
    match scripts.is_empty() {
        true => Err("no transcript has that in its name".to_owned()),
        false => Ok(scripts),
    }
}

/// A file of the repository.
fn read(path: &str) -> Result<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// Looks whether there is a server that can be judged.
fn probe(theatre: &Theatre) -> Result<(), Verdict> {
    match &theatre.server {
        Some(address) => probe::probe(address, &theatre.patience),
        None => {
            let server = process::Server::start(&[]).map_err(Verdict::Wrong)?;
            probe::probe(&server.address, &theatre.patience)
        }
    }
}

/// A script, and the ways in which it is still to be played.
type Task<'a> = (&'a Script, &'static [Way]);

/// Plays the scripts, several at once, until there is no patience left, telling each outcome.
fn play(theatre: &Theatre, mut tasks: Vec<Task>, tell: impl Fn(&Script, Outcome) + Sync) {
    // In a room that everybody shares one plays at a time, what is quick first, and everything in
    // one way before anything in the next. Otherwise what takes longest begins first.
    let is_shared = theatre.server.is_some();
    tasks.sort_by_key(|(script, _)| (script.is_slow || script.is_lengthy()) == is_shared);
    let shares = |(script, _): &Task| is_shared && !script.is_apart();
    let (shared, apart): (VecDeque<_>, VecDeque<_>) = tasks.into_iter().partition(shares);
    let queues = [(1, Mutex::new(shared)), (PLAYED_AT_ONCE, Mutex::new(apart))];
    thread::scope(|scope| {
        for (players, queue) in &queues {
            for _ in 0..*players {
                scope.spawn(|| loop {
                    let Some((script, ways)) = queue.lock().unwrap().pop_front() else { break };
                    let (now, later) = ways.split_at(if is_shared { 1 } else { ways.len() });
                    let outcome = match theatre.is_exhausted() {
                        Some(why) => Outcome::Skipped(why),
                        None => Stage::play(theatre, script, now),
                    };
                    let outcome = match outcome {
                        Outcome::Passed if !later.is_empty() => {
                            queue.lock().unwrap().push_back((script, later));
                            continue;
                        }
                        Outcome::Skipped(_) if !now.contains(&Way::AsWritten) => {
                            Outcome::PassedAsWritten
                        }
                        outcome => outcome,
                    };
                    if let Outcome::Failed(_) = outcome {
                        theatre.patience.failed();
                    }
                    tell(script, outcome);
                });
            }
        }
    });
}

/// The suite's test of itself: in front of the real server stands a proxy that breaks one rule,
/// and some transcript must fail; one that breaks nothing must pass them all.
fn test_the_suite(theatre: &Theatre, scripts: &[Script], report: &Mutex<Report>) {
    let is_short = |script: &&Script| !script.is_large() && !script.is_about_our_client();
    let scripts: Vec<_> = scripts.iter().filter(is_short).collect();
    let faults = Mutex::new(Proxy::broken().collect::<VecDeque<_>>());
    let behind = |proxy| Theatre {
        proxy: Some(proxy),
        patience: Patience::like(theatre.patience.slowest()),
        ..Theatre::default()
    };
    let tasks = scripts.iter().map(|&script| (script, AS_WRITTEN)).collect();
    play(&behind(Proxy::honest()), tasks, |script, outcome| {
        if let Outcome::Failed(why) = outcome {
            let what = format!("a proxy that breaks nothing passes {}\n{why}", script.name);
            report.lock().unwrap().check(false, &what);
        }
    });
    thread::scope(|scope| {
        for _ in 0..PLAYED_AT_ONCE {
            scope.spawn(|| loop {
                let Some(proxy) = faults.lock().unwrap().pop_front() else { break };
                let fault = proxy.fault;
                // First what is quick, and is enough for most.
                let theatre = behind(proxy);
                let fails = |script: &&&Script, ways| {
                    matches!(Stage::play(&theatre, script, ways), Outcome::Failed(_))
                };
                let found = scripts.iter().find(|script| fails(script, AS_WRITTEN));
                let in_others = |script: &&&Script| fails(script, &theatre.ways(script)[1..]);
                let found = found.or_else(|| scripts.iter().find(in_others));
                let what = match found {
                    Some(script) => (true, format!("a server that {fault} fails {}", script.name)),
                    None => (false, format!("no transcript fails with a server that {fault}")),
                };
                report.lock().unwrap().check(what.0, &what.1);
            });
        }
    });
}

fn run() -> Result<bool, String> {
    let Options { theatre, only, is_verbose } = parse_arguments(std::env::args().skip(1))?;
    let scripts = load_scripts(only.as_deref())?;
    match probe(&theatre) {
        Ok(()) => {}
        Err(Verdict::CannotJudge(why)) => return Err(why),
        Err(Verdict::Wrong(what)) => {
            print_line!("FAILED  {what}\n\n0 passed, 1 failed");
            return Ok(false);
        }
    }
    let report = Mutex::new(Report::new(is_verbose));
    let tasks = scripts.iter().map(|script| (script, theatre.ways(script))).collect();
    play(&theatre, tasks, |script, outcome| report.lock().unwrap().count(script, outcome));
    let is_whole = only.is_none() && theatre.is_plain();
    if is_whole {
        report.lock().unwrap().check_the_table(&scripts, &read("conformance/README.md")?);
        if !report.lock().unwrap().has_failures() {
            test_the_suite(&theatre, &scripts, &report);
        }
    }
    let report = report.into_inner().unwrap();
    report.print(theatre.server.is_some());
    match report.has_skipped(TOO_LATE) && !report.has_failures() {
        true => {
            Err("too slow to be judged in half a minute; SLOW=1 takes what it needs".to_owned())
        }
        false => Ok(!report.has_failures()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("conformance: {error}");
            ExitCode::from(2)
        }
    }
}
