//! Replays the transcripts in `conformance/transcripts`, and those in PROTOCOL.md, against a linechat
//! server. `conformance/README.md` says how it is used and how transcripts are written.

/// Prints a line. The reader may have gone, as `head` does.
macro_rules! print_line {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}

mod broken;
mod client;
mod forms;
mod player;
mod probe;
mod process;
mod report;
mod rules;
mod screen;
mod script;
mod session;
mod target;
mod text;
mod timeouts;

use client::Via;
use player::play;
use probe::Verdict;
use report::Report;
use script::{Level, Script};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::thread;
use target::{Outcome, Target};

/// The modules in layers: each uses only those before it.
const LAYERS: [&str; 14] = [
    "text", "rules", "process", "screen", "timeouts", "client", "probe", "broken", "forms",
    "script", "target", "session", "player", "report",
];

/// Transcripts played at the same time. They mostly wait, so more than there are processors.
const PLAYED_AT_ONCE: usize = 8;

/// `Script::size` of what is played behind each proxy.
const SHORT: usize = 100_000;

/// Returns the target, and what the names of the transcripts must contain.
fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<(Target, String), String> {
    let (mut target, mut only) = (Target::default(), String::new());
    let mut arguments = arguments.filter(|argument| !argument.is_empty());
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--server" => target.server = Some(value()?),
            "--via" => target.via = Some(Via::parse(&value()?)?),
            "--level" => {
                target.levels = value()?.split(',').map(Level::parse).collect::<Result<_, _>>()?;
            }
            "--only" => only = value()?,
            "--slow" => target.slow = true,
            _ => {
                return Err(format!(
                    "there is no option {option}: --server, --via, --level, --only or --slow"
                ))
            }
        }
    }
    Ok((target, only))
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

/// Finds out whether the server can be judged.
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
fn in_parallel<T>(workers: usize, items: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    let items = Mutex::new(items);
    let next = || items.lock().unwrap().next();
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(item) = next() {
                    work(item);
                }
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
    // In a shared room one transcript is played at a time, the quick ones first. Otherwise those that
    // take longest begin first.
    scripts.sort_by_key(|script| (script.is_slow, script.size()));
    let players = match target.server {
        Some(_) => 1,
        None => {
            scripts.reverse();
            PLAYED_AT_ONCE
        }
    };
    in_parallel(players, scripts.into_iter(), |script| {
        let outcome = match target.is_exhausted() {
            Some(why) => Outcome::Skipped(why),
            None => play(target, script),
        };
        if let Outcome::Failed(_) = outcome {
            target.timeouts.has_failed.store(true, Ordering::Relaxed);
        }
        tell(script, outcome);
    });
}

/// The suite's test of itself: behind a proxy that breaks nothing all transcripts must pass, and
/// behind each that breaks one rule some transcript must fail.
fn test_the_suite(scripts: &[Script], report: &Mutex<Report>) {
    let is_short = |script: &&Script| script.size() < SHORT && script.level != Level::Linechat;
    let mut scripts: Vec<_> = scripts.iter().filter(is_short).collect();
    scripts.sort_by_key(|script| script.size());
    in_parallel(PLAYED_AT_ONCE, broken::FAULTS.iter(), |fault| {
        let target = Target { fault: Some(fault), ..Target::default() };
        let failure = scripts.iter().find_map(|script| match play(&target, script) {
            Outcome::Failed(why) => Some((&script.name, why)),
            Outcome::Passed | Outcome::Skipped(_) => None,
        });
        let must_fail = !matches!(fault.1, broken::Rule::Nothing);
        let what = match &failure {
            None => "passes every transcript".to_owned(),
            Some((name, _)) if must_fail => format!("fails {name}"),
            Some((name, why)) => format!("fails {name}\n{why}"),
        };
        let what = format!("a server that {} {what}", fault.0);
        report.lock().unwrap().check(failure.is_some() == must_fail, &what);
    });
}

/// No modules of the suite import each other in a circle.
fn check_the_layers(report: &mut Report) -> Result<(), String> {
    for (at, layer) in LAYERS.iter().enumerate() {
        let source = read(&format!("conformance/suite/{layer}.rs"))?;
        let uses = |other: &&&str| source.contains(&format!("crate::{other}"));
        let other = LAYERS[at..].iter().find(uses);
        report.check(other.is_none(), &format!("{layer} uses no module after it: {other:?}"));
    }
    let files = names_in("conformance/suite", ".rs")?.len();
    report.check(files == LAYERS.len() + 1, "each file in suite/ is a layer");
    Ok(())
}

fn run() -> Result<bool, String> {
    let (target, only) = parse_arguments(std::env::args().skip(1))?;
    let all = load_scripts()?;
    let is_asked = |script: &&Script| script.name.contains(&only) && target.has_level(script.level);
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
    let report = Mutex::new(Report::default());
    play_all(&target, scripts, |script, outcome| report.lock().unwrap().count(script, outcome));
    if only.is_empty() && target.levels.is_empty() && target.is_plain() {
        check_the_layers(&mut report.lock().unwrap())?;
        let (readme, protocol) = (read("conformance/README.md")?, read("PROTOCOL.md")?);
        report.lock().unwrap().check_the_documents(&all, &readme, &protocol);
        test_the_suite(&all, &report);
    }
    match report.into_inner().unwrap().print(&target) {
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
