//! What is told of a run: each failure as soon as it is seen; at the end each requirement, each
//! level, and what was not checked.

use crate::script::{Level, Script, SECTIONS};
use crate::target::{Outcome, Target};
use std::collections::BTreeMap;

/// conformance/README.md, "Requirements", numbers R1 to R18.
const REQUIREMENTS: std::ops::RangeInclusive<u32> = 1..=18;

/// Transcripts that passed, failed, and were not played.
#[derive(Clone, Copy, Default)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Count {
    fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }
}

/// What came of the transcripts of a requirement, or of a level.
#[derive(Default)]
struct Row {
    count: Count,
    /// The sections of PROTOCOL.md that they are about.
    sections: Vec<&'static str>,
    failed: Vec<String>,
    /// Why one of them was not played.
    skipped: Option<&'static str>,
}

impl Row {
    /// As in "3 of 9 (2 not played)"; with the reason if nothing was played.
    fn show(&self) -> String {
        let Count { passed, failed, skipped } = self.count;
        let skipped = match (skipped, self.skipped.filter(|_| passed + failed == 0)) {
            (0, _) => String::new(),
            (_, Some(why)) => format!(" ({skipped} not played: {why})"),
            (_, None) => format!(" ({skipped} not played)"),
        };
        format!("{passed} of {}{skipped}", passed + failed)
    }
}

#[derive(Default)]
pub struct Report {
    /// What passes is told, too.
    is_verbose: bool,
    all: Count,
    requirements: BTreeMap<u32, Row>,
    levels: BTreeMap<Level, Row>,
    /// The transcripts that were not played, by the reason.
    skipped: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    pub fn new(is_verbose: bool) -> Report {
        Report { is_verbose, ..Report::default() }
    }

    pub fn has_failures(&self) -> bool {
        self.all.failed > 0
    }

    /// Some transcript was not played for this reason.
    pub fn has_skipped(&self, why: &str) -> bool {
        self.skipped.contains_key(why)
    }

    /// What came of a transcript.
    pub fn count(&mut self, script: &Script, outcome: &Outcome) {
        let Script { name, requirement, level, section, claim, .. } = script;
        let row = self.requirements.entry(*requirement).or_default();
        row.count.add(outcome);
        let of_level = self.levels.entry(*level).or_default();
        of_level.count.add(outcome);
        if let Some(section) = section.filter(|section| !row.sections.contains(section)) {
            row.sections.push(section);
        }
        let what = format!("R{requirement} {name}: {claim}");
        match outcome {
            Outcome::Passed => self.check(true, &what),
            Outcome::Failed(why) => {
                row.failed.push(name.clone());
                let see = section.map_or(String::new(), |section| {
                    format!("\n        see PROTOCOL.md, {section}")
                });
                self.check(false, &format!("{what}{see}\n{why}"));
            }
            Outcome::Skipped(why) => {
                (row.skipped, of_level.skipped) = (Some(*why), Some(*why));
                self.all.skipped += 1;
                self.skipped.entry(why).or_default().push(name.clone());
            }
        }
    }

    /// What came of anything else.
    pub fn check(&mut self, passed: bool, what: &str) {
        match passed {
            true => self.all.passed += 1,
            false => self.all.failed += 1,
        }
        match passed {
            true if self.is_verbose => print_line!("ok      {what}"),
            true => {}
            false => print_line!("FAILED  {what}"),
        }
    }

    /// conformance/README.md must name each transcript in the row of its requirement, and each
    /// requirement must have one.
    pub fn check_the_table(&mut self, scripts: &[Script], readme: &str) {
        for requirement in REQUIREMENTS {
            let row = format!("| R{requirement} |");
            let row = readme.lines().find(|line| line.starts_with(&row)).unwrap_or_default();
            let mine = scripts.iter().filter(|script| script.requirement == requirement);
            let names: Vec<_> =
                mine.filter_map(|script| script.name.strip_suffix(".txt")).collect();
            let unnamed = names.iter().find(|name| !row.contains(&format!("`{name}`")));
            let what = format!("conformance/README.md names each transcript of R{requirement}");
            match unnamed {
                None => self.check(!names.is_empty(), &what),
                Some(name) => self.check(false, &format!("{what}, but not {name}")),
            }
        }
    }

    pub fn print(&self, target: &Target) {
        print_line!("\nrequirement  passed   PROTOCOL.md");
        for (requirement, row) in &self.requirements {
            let played = row.count.passed + row.count.failed;
            let passed = format!("{} of {played}", row.count.passed);
            let sections = SECTIONS.into_iter().filter(|it| row.sections.contains(it));
            let sections = sections.collect::<Vec<_>>().join("; ");
            let why = row.skipped.filter(|_| played == 0).unwrap_or(&sections);
            print_line!("R{requirement:<11} {passed:<8} {why}");
            for name in &row.failed {
                print_line!("             failed:  {name}");
            }
        }
        self.print_skipped(target);
        let levels = self.levels.iter();
        let levels: Vec<_> =
            levels.map(|(level, row)| format!("{} {}", level.name(), row.show())).collect();
        let Count { passed, failed, skipped } = self.all;
        print_line!("\n{}", levels.join(", "));
        print_line!("{passed} passed, {failed} failed, {skipped} not played");
    }

    fn print_skipped(&self, target: &Target) {
        if target.server.is_some() || !self.skipped.is_empty() {
            print_line!("\nNot checked:");
        }
        for (why, names) in &self.skipped {
            match names.as_slice() {
                [name] => print_line!("  {name}: {why}"),
                [first, ..] => print_line!("  {} and {} more: {why}", first, names.len() - 1),
                [] => {}
            }
        }
        if target.server.is_some() && !target.slow && target.has_level(Level::Core) {
            print_line!("  NAME time-out: skipped, because it takes a minute: SLOW=1 checks it");
        }
        if target.server.is_some() {
            print_line!("  what no client sees: a peer that vanishes, telnet's urgent byte");
        }
    }
}
