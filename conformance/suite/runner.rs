//! Replays the transcripts in `conformance/transcripts`, and those in PROTOCOL.md, against a linechat server.
//!
//!     make conformance                        the server of this repository, one for each transcript
//!     make conformance SERVER=localhost:9999  any linechat/1 server that is running and empty
//!     make conformance VIA=nc                 every client is a real nc (or telnet) process
//!     make conformance ONLY=private           only the transcripts with this in their name
//!
//! `conformance/README.md` describes the language of transcripts; `script.rs` reads it,
//! `stage.rs` plays it, `broken.rs` breaks a server on purpose to see that the suite notices.

mod broken;
mod process;
mod screen;
mod script;
mod stage;

use broken::Proxy;
use script::Script;
use stage::{Outcome, Stage, Theatre};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::thread;

/// Transcripts played at the same time. They mostly wait, so more than there are processors.
const PLAYED_AT_ONCE: usize = 8;

/// What PROTOCOL.md, "Requirements", numbers R1 to R18.
const REQUIREMENTS: std::ops::RangeInclusive<u32> = 1..=18;

struct Options {
    theatre: Theatre,
    only: Option<String>,
}

fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { theatre: Theatre::default(), only: None };
    let mut arguments = arguments.filter(|argument| !argument.is_empty());
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or(format!("{option} needs a value"))?;
        match option.as_str() {
            "--server" => options.theatre.server = Some(value),
            "--via" => options.theatre.via = value.parse()?,
            "--only" => options.only = Some(value),
            _ => return Err(format!("there is no option {option}: --server, --via or --only")),
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

/// Plays the scripts, several at once, until `stop_at` failures have come.
fn play<'a>(
    theatre: &Theatre,
    scripts: &'a [Script],
    stop_at: usize,
) -> Vec<(&'a Script, Outcome)> {
    let waiting: Mutex<VecDeque<&Script>> = Mutex::new(scripts.iter().collect());
    let outcomes = Mutex::new(Vec::new());
    let failed = |outcomes: &Vec<(&Script, Outcome)>| {
        outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_))).count()
    };
    // A server that everybody shares is played to by one at a time.
    let players = if theatre.server.is_some() { 1 } else { PLAYED_AT_ONCE };
    thread::scope(|scope| {
        for _ in 0..players {
            scope.spawn(|| loop {
                let Some(script) = waiting.lock().unwrap().pop_front() else { break };
                let outcome = Stage::play(theatre, script);
                let mut outcomes = outcomes.lock().unwrap();
                if theatre.is_over.load(Ordering::Relaxed) {
                    break;
                }
                outcomes.push((script, outcome));
                if failed(&outcomes) >= stop_at {
                    theatre.is_over.store(true, Ordering::Relaxed);
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap();
    outcomes.sort_by_key(|(script, _)| &script.name);
    outcomes
}

/// What has been counted, and the lines to print of it.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    covered: BTreeMap<u32, Vec<String>>,
}

impl Tally {
    fn count(&mut self, script: &Script, outcome: &Outcome) {
        let Script { name, requirement, claim, .. } = script;
        let label = match outcome {
            Outcome::Passed => {
                self.passed += 1;
                self.covered.entry(*requirement).or_default().push(name.clone());
                "ok     "
            }
            Outcome::Failed(_) => {
                self.failed += 1;
                "FAILED "
            }
            Outcome::Skipped(_) => {
                self.skipped += 1;
                "skipped"
            }
        };
        println!("{label} R{requirement:<2} {name}: {claim}");
        match outcome {
            Outcome::Passed => {}
            Outcome::Failed(why) => println!("{why}"),
            Outcome::Skipped(why) => println!("        {why}"),
        }
    }

    /// One check of the suite itself.
    fn check(&mut self, passed: bool, what: &str) {
        if passed {
            self.passed += 1;
            println!("ok      {what}");
        } else {
            self.failed += 1;
            println!("FAILED  {what}");
        }
    }

    fn print_coverage(&self) {
        println!("\nRequirements and the transcripts that show them:");
        for requirement in REQUIREMENTS {
            let names = self.covered.get(&requirement).map(|names| names.join(", "));
            println!("  R{requirement:<2}  {}", names.unwrap_or("none".to_owned()));
        }
    }
}

/// PROTOCOL.md must name each transcript in the row of its requirement.
fn check_the_document(scripts: &[Script], tally: &mut Tally) -> Result<(), String> {
    let document = read("PROTOCOL.md")?;
    let is_named = |script: &Script| {
        let row = format!("| R{} |", script.requirement);
        let name = format!("`{}`", script.name.trim_end_matches(".txt"));
        document.lines().any(|line| line.starts_with(&row) && line.contains(&name))
    };
    let mut files = scripts.iter().filter(|script| script.name.ends_with(".txt"));
    let unnamed = files.find(|script| !is_named(script)).map(|script| script.name.as_str());
    println!();
    match unnamed {
        None => tally.check(true, "PROTOCOL.md names every transcript with its requirement"),
        Some(name) => {
            tally.check(false, &format!("PROTOCOL.md does not name {name} where it should"))
        }
    }
    Ok(())
}

/// A file of the repository.
fn read(path: &str) -> Result<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// The suite's test of itself: in front of the real server stands a proxy that breaks one rule,
/// and some transcript must fail; one that breaks nothing must pass them all.
fn test_the_suite(scripts: &[Script], tally: &mut Tally) {
    println!("\nThe suite itself, tested against servers broken on purpose:");
    let honest = Theatre { proxy: Some(Proxy::honest()), ..Theatre::default() };
    let outcomes = play(&honest, scripts, usize::MAX);
    for (script, outcome) in &outcomes {
        if let Outcome::Failed(why) = outcome {
            println!("{}:\n{why}", script.name);
        }
    }
    let all_passed = outcomes.iter().all(|(_, outcome)| !matches!(outcome, Outcome::Failed(_)));
    tally.check(all_passed, "a proxy that breaks nothing passes");
    for proxy in Proxy::broken() {
        let what = format!("noticed: a server that {}", proxy.fault);
        let theatre = Theatre { proxy: Some(proxy), ..Theatre::default() };
        let outcomes = play(&theatre, scripts, 1);
        let failure = outcomes.iter().find(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
        match failure {
            Some((script, _)) => tally.check(true, &format!("{what} (by {})", script.name)),
            None => tally.check(false, &what),
        }
    }
}

fn run() -> Result<bool, String> {
    let options = parse_arguments(std::env::args().skip(1))?;
    let scripts = load_scripts(options.only.as_deref())?;
    let mut tally = Tally::default();
    for (script, outcome) in play(&options.theatre, &scripts, usize::MAX) {
        tally.count(script, &outcome);
    }
    let is_whole = options.only.is_none() && options.theatre.is_plain();
    if is_whole {
        check_the_document(&scripts, &mut tally)?;
    }
    if is_whole && tally.failed == 0 {
        test_the_suite(&scripts, &mut tally);
    }
    tally.print_coverage();
    if is_whole {
        for requirement in REQUIREMENTS.filter(|number| !tally.covered.contains_key(number)) {
            tally.failed += 1;
            println!("FAILED  R{requirement} has no transcript");
        }
    }
    println!();
    match tally.skipped {
        0 => println!("{} passed, {} failed", tally.passed, tally.failed),
        skipped => println!("{} passed, {} failed, {skipped} skipped", tally.passed, tally.failed),
    }
    Ok(tally.failed == 0)
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
