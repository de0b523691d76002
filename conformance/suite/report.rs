//! What is told of a run: each failure as soon as it is seen; at the end each requirement, each
//! level, and what was not checked.

use crate::script::{Level, Script};
use crate::target::{Outcome, Target, TOO_LATE};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;

/// conformance/README.md, "Requirements", numbers R1 to R18.
const REQUIREMENTS: std::ops::RangeInclusive<u32> = 1..=18;

/// The transcripts of a requirement, of a level, or of a whole run.
#[derive(Default)]
struct Row<'a> {
    passed: usize,
    failed: Vec<&'a str>,
    /// Those that were not played, each with the reason.
    skipped: Vec<(&'static str, &'a str)>,
    /// The sections of PROTOCOL.md that they are about.
    sections: BTreeSet<&'a str>,
}

impl Row<'_> {
    fn played(&self) -> usize {
        self.passed + self.failed.len()
    }

    /// Why none of them was played; `None` if one was.
    fn why_none(&self) -> Option<&'static str> {
        self.skipped.first().filter(|_| self.played() == 0).map(|(why, _)| *why)
    }
}

#[derive(Default)]
pub struct Report<'a> {
    outcomes: Vec<(&'a Script, Outcome)>,
    /// How many other checks passed and failed.
    checks: (usize, usize),
}

impl<'a> Report<'a> {
    /// What came of a transcript.
    pub fn count(&mut self, script: &'a Script, outcome: Outcome) {
        let Script { name, requirement, section, claim, .. } = script;
        let what = format!("R{requirement} {name}: {claim}");
        match (&outcome, section) {
            (Outcome::Passed, _) => self.tell(true, &what),
            (Outcome::Failed(why), None) => self.tell(false, &format!("{what}\n{why}")),
            (Outcome::Failed(why), Some(section)) => {
                self.tell(false, &format!("{what}\n        see PROTOCOL.md, {section}\n{why}"));
            }
            (Outcome::Skipped(_), _) => {}
        }
        self.outcomes.push((script, outcome));
    }

    /// What came of anything else.
    pub fn check(&mut self, passed: bool, what: &str) {
        match passed {
            true => self.checks.0 += 1,
            false => self.checks.1 += 1,
        }
        self.tell(passed, what);
    }

    /// Prints failures, and, at a terminal, what passes.
    fn tell(&self, passed: bool, what: &str) {
        match passed {
            true if std::io::stdout().is_terminal() => print_line!("ok      {what}"),
            true => {}
            false => print_line!("FAILED  {what}"),
        }
    }

    /// conformance/README.md must name each transcript in the row of its requirement, each requirement
    /// must have one, and PROTOCOL.md each section that a transcript names.
    pub fn check_the_documents(&mut self, scripts: &[Script], readme: &str, protocol: &str) {
        for requirement in REQUIREMENTS {
            let row = format!("| R{requirement} |");
            let row = readme.lines().find(|line| line.starts_with(&row)).unwrap_or_default();
            let mine = scripts.iter().filter(|script| script.requirement == requirement);
            let names: Vec<_> =
                mine.filter_map(|script| script.name.strip_suffix(".txt")).collect();
            let missing = names.iter().find(|name| !row.contains(&format!("`{name}`")));
            let what = format!("the row of R{requirement} in conformance/README.md names each");
            let what = format!("{what} of its transcripts (missing: {missing:?})");
            self.check(!names.is_empty() && missing.is_none(), &what);
        }
        for script in scripts {
            let has = |section: &&String| {
                protocol.lines().any(|line| line.strip_prefix("## ") == Some(section))
            };
            if let Some(section) = script.section.as_ref().filter(|section| !has(section)) {
                self.check(false, &format!("{}: PROTOCOL.md has no '{section}'", script.name));
            }
        }
    }

    /// The transcripts for which this is true.
    fn row(&self, is_in: impl Fn(&Script) -> bool) -> Row<'_> {
        let mut row = Row::default();
        for (script, outcome) in self.outcomes.iter().filter(|(script, _)| is_in(script)) {
            match outcome {
                Outcome::Passed => row.passed += 1,
                Outcome::Failed(_) => row.failed.push(&script.name),
                Outcome::Skipped(why) => row.skipped.push((why, &script.name)),
            }
            row.sections.extend(script.section.as_deref());
        }
        row
    }

    /// Prints the end of a run. Returns how many checks failed, and whether there was no time for some
    /// transcript.
    pub fn print(&self, target: &Target) -> (usize, bool) {
        print_line!("\nrequirement  passed   PROTOCOL.md");
        for requirement in REQUIREMENTS {
            let row = self.row(|script| script.requirement == requirement);
            if row.played() + row.skipped.len() > 0 {
                let passed = format!("{} of {}", row.passed, row.played());
                let sections = Vec::from_iter(row.sections.iter().copied()).join("; ");
                let why = row.why_none().unwrap_or(&sections);
                print_line!("R{requirement:<11} {passed:<8} {why}");
            }
            for name in row.failed {
                print_line!("             failed:  {name}");
            }
        }
        let all = self.row(|_| true);
        print_skipped(target, &all);
        let levels = Level::ALL.map(|level| (level, self.row(|script| script.level == level)));
        let levels = levels.iter().filter(|(_, row)| row.played() + row.skipped.len() > 0);
        let levels = levels.map(|(level, row)| {
            let why = row.why_none().map_or(String::new(), |why| format!(": {why}"));
            let skipped = match row.skipped.len() {
                0 => String::new(),
                count => format!(" ({count} not played{why})"),
            };
            format!("{} {} of {}{skipped}", level.name(), row.passed, row.played())
        });
        print_line!("\n{}", levels.collect::<Vec<_>>().join(", "));
        let (passed, failed) = (all.passed + self.checks.0, all.failed.len() + self.checks.1);
        print_line!("{passed} passed, {failed} failed, {} not played", all.skipped.len());
        (failed, all.skipped.iter().any(|(why, _)| *why == TOO_LATE))
    }
}

fn print_skipped(target: &Target, all: &Row) {
    if target.server.is_some() || !all.skipped.is_empty() {
        print_line!("\nNot checked:");
    }
    let mut by_reason = BTreeMap::<&str, Vec<&str>>::new();
    for (why, name) in &all.skipped {
        by_reason.entry(why).or_default().push(name);
    }
    for (why, names) in by_reason {
        print_line!("  {}: {why}", names.join(", "));
    }
    if target.server.is_some() && !target.slow && target.has_level(Level::Core) {
        print_line!("  NAME time-out: skipped, because it takes a minute: SLOW=1 checks it");
    }
    if target.server.is_some() {
        print_line!("  what no client sees: a peer that vanishes, telnet's urgent byte");
    }
}
