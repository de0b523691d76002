//! Replays the transcripts in `conformance/transcripts`, and those in PROTOCOL.md, against a linechat
//! server. `conformance/README.md` says how it is used and how transcripts are written.
//!
//! The modules below stand in layers: each uses only those above it, which a whole run checks.

/// Prints a line. The reader may have gone, as `head` does.
macro_rules! print_line {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}

// What a transcript's texts stand for.
mod text;
// What PROTOCOL.md says about every line.
mod rules;
// The server's process.
mod process;
// What a terminal shows.
mod screen;
// How long to wait.
mod timeouts;
// One client and what it has received.
mod client;
// A first look at a server.
mod probe;
// Servers that are wrong on purpose.
mod broken;
// The steps of transcripts, as data.
mod forms;
// Transcripts.
mod script;
// What is tested.
mod target;
// One transcript being played: state, looks, fences.
mod session;
// Carries out each step.
mod player;
// What is told of a run.
mod report;

use player::play;
use probe::Verdict;
use report::Report;
use script::{Level, Script};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::thread;
use target::{Outcome, Target, TOO_LATE};

/// Transcripts played at the same time. They mostly wait, so more than there are processors.
const PLAYED_AT_ONCE: usize = 8;

#[derive(Default)]
struct Options {
    target: Target,
    only: Option<String>,
    /// What passes is told, too.
    is_verbose: bool,
}

fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { is_verbose: std::io::stdout().is_terminal(), ..Options::default() };
    let mut arguments = arguments.filter(|argument| !argument.is_empty());
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--server" => options.target.server = Some(value()?),
            "--via" => options.target.via = Some(value()?.parse()?),
            "--level" => options.target.levels = parse_levels(&value()?)?,
            "--only" => options.only = Some(value()?),
            "--slow" => options.target.slow = true,
            "-v" => options.is_verbose = true,
            _ => {
                return Err(format!(
                    "there is no option {option}: --server, --via, --level, --only, --slow or -v"
                ))
            }
        }
    }
    Ok(options)
}

fn parse_levels(names: &str) -> Result<Vec<Level>, String> {
    let level = |name: &str| {
        Level::parse(name)
            .ok_or(format!("a level is core, telnet, overload or linechat, not {name}"))
    };
    names.split(',').map(level).collect()
}

/// A file of the repository.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> Result<String, String> {
    std::fs::read_to_string(path(name)).map_err(|error| format!("cannot read {name}: {error}"))
}

/// The names of the files in a folder of the repository that end like this.
fn names_in(folder: &str, end: &str) -> Result<Vec<String>, String> {
    let listing = std::fs::read_dir(path(folder)).map_err(|error| error.to_string())?;
    let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(end)).collect();
    names.sort();
    Ok(names)
}

/// Every transcript, by name: the files and the examples in PROTOCOL.md.
fn load_scripts() -> Result<Vec<Script>, String> {
    let mut scripts = Vec::new();
    for name in names_in("conformance/transcripts", ".txt")? {
        scripts.push(Script::from_file(&name, &read(&format!("conformance/transcripts/{name}"))?)?);
    }
    scripts.extend(Script::from_document("PROTOCOL.md", &read("PROTOCOL.md")?)?);
    Ok(scripts)
}

/// Looks whether there is a server that can be judged.
fn probe(target: &Target) -> Result<(), Verdict> {
    match &target.server {
        Some(address) => probe::probe(address, &target.timeouts),
        None => {
            let server = process::Server::start(&[]).map_err(Verdict::Wrong)?;
            probe::probe(&server.address, &target.timeouts)
        }
    }
}

/// Does this with each of the items, several at once.
fn in_parallel<T: Send>(workers: usize, items: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let items = Mutex::new(items.collect::<VecDeque<_>>());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| loop {
                let Some(item) = items.lock().unwrap().pop_front() else { break };
                work(item);
            });
        }
    });
}

/// Plays the scripts until the time is over, and tells each outcome.
fn play_all<'a>(
    target: &Target,
    mut scripts: Vec<&'a Script>,
    tell: impl Fn(&'a Script, Outcome) + Sync,
) {
    // In a room that everybody shares one is played at a time, the quick ones first. Otherwise what
    // takes longest begins first.
    let is_shared = target.server.is_some();
    scripts.sort_by_key(|script| (script.is_slow || script.is_lengthy()) == is_shared);
    let shares = |script: &&Script| is_shared && !script.is_apart();
    let (shared, apart): (Vec<_>, Vec<_>) = scripts.into_iter().partition(shares);
    let play_one = |script| {
        let outcome = match target.is_exhausted() {
            Some(why) => Outcome::Skipped(why),
            None => play(target, script),
        };
        if let Outcome::Failed(_) = outcome {
            target.timeouts.has_failed.store(true, Ordering::Relaxed);
        }
        tell(script, outcome);
    };
    thread::scope(|scope| {
        scope.spawn(|| in_parallel(1, shared.into_iter(), &play_one));
        in_parallel(PLAYED_AT_ONCE, apart.into_iter(), &play_one);
    });
}

/// The suite's test of itself: behind a proxy that breaks nothing all transcripts must pass, and
/// behind each that breaks one rule some transcript must fail.
fn test_the_suite(scripts: &[Script], report: &Mutex<Report>) {
    let is_short = |script: &&Script| !script.is_large() && script.level != Level::Linechat;
    let scripts: Vec<_> = scripts.iter().filter(is_short).collect();
    let behind = |fault| Target { fault: Some(fault), ..Target::default() };
    play_all(&behind(&broken::HONEST), scripts.clone(), |script, outcome| {
        if let Outcome::Failed(why) = outcome {
            let what = format!("a proxy that breaks nothing passes {}\n{why}", script.name);
            report.lock().unwrap().check(false, &what);
        }
    });
    in_parallel(PLAYED_AT_ONCE, broken::FAULTS.iter(), |fault| {
        let target = behind(fault);
        let fails = |script: &&&Script| matches!(play(&target, script), Outcome::Failed(_));
        let found = scripts.iter().find(fails).map(|script| &script.name);
        let what = format!("a server that {} fails a transcript: {found:?}", fault.0);
        report.lock().unwrap().check(found.is_some(), &what);
    });
}

/// Each module of the suite uses only those declared before it, so they import in no circle.
fn check_the_layers(report: &mut Report) -> Result<(), String> {
    let runner = read("conformance/suite/runner.rs")?;
    let layers = runner.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    let layers: Vec<_> = layers.collect();
    for (at, layer) in layers.iter().enumerate() {
        let source = read(&format!("conformance/suite/{layer}.rs"))?;
        let uses = |other: &&&str| source.contains(&format!("crate::{other}"));
        let what = format!("the suite's {layer} uses only modules above it");
        match layers[at..].iter().find(uses) {
            None => report.check(true, &what),
            Some(other) => report.check(false, &format!("{what}, but not {other}")),
        }
    }
    let files = names_in("conformance/suite", ".rs")?.len();
    report.check(files == layers.len() + 1, "each file in suite/ is a module of runner.rs");
    Ok(())
}

/// What the transcripts say about the documents is true.
fn check_the_documents(report: &mut Report, scripts: &[Script]) -> Result<(), String> {
    report.check_the_table(scripts, &read("conformance/README.md")?);
    let document = read("PROTOCOL.md")?;
    for section in script::SECTIONS {
        let is_heading = document.lines().any(|line| line.strip_prefix("## ") == Some(section));
        report.check(is_heading, &format!("'{section}' is a section of PROTOCOL.md"));
    }
    Ok(())
}

fn run() -> Result<bool, String> {
    let Options { target, only, is_verbose } = parse_arguments(std::env::args().skip(1))?;
    let all = load_scripts()?;
    let is_asked = |script: &&Script| {
        let has_name = only.as_ref().is_none_or(|only| script.name.contains(only.as_str()));
        has_name && target.has_level(script.level)
    };
    let scripts: Vec<_> = all.iter().filter(is_asked).collect();
    if scripts.is_empty() {
        return Err("no transcript of these levels has that in its name".to_owned());
    }
    match probe(&target) {
        Ok(()) => {}
        Err(Verdict::CannotJudge(why)) => return Err(why),
        Err(Verdict::Wrong(what)) => {
            print_line!("FAILED  {what}\n\n0 passed, 1 failed, no transcript was played");
            return Ok(false);
        }
    }
    let report = Mutex::new(Report::new(is_verbose));
    play_all(&target, scripts, |script, outcome| report.lock().unwrap().count(script, outcome));
    if only.is_none() && target.levels.is_empty() && target.is_plain() {
        check_the_layers(&mut report.lock().unwrap())?;
        check_the_documents(&mut report.lock().unwrap(), &all)?;
        test_the_suite(&all, &report);
    }
    match report.into_inner().unwrap().print(&target, TOO_LATE) {
        (0, true) => {
            Err("too slow to be judged in half a minute; SLOW=1 takes what it needs".to_owned())
        }
        (failed, _) => Ok(failed == 0),
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
