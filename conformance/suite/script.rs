//! Reads transcripts. `conformance/README.md` describes their language.

use crate::forms::{Action, Needs, Step};
use crate::text::Text;
use std::iter::Peekable;

/// People in a room, or steps, that are many.
const CROWD: usize = 40;
const LENGTHY: usize = 150;

/// What a transcript asks of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What clients and servers need to talk to each other.
    Core,
    /// PROTOCOL.md, "Annex A".
    Telnet,
    /// PROTOCOL.md, "Annex B".
    Overload,
    /// What this repository's server and client do beside the protocol.
    Linechat,
}

/// The sections of PROTOCOL.md that transcripts are about.
pub const SECTIONS: [&str; 17] = [
    "An example session",
    "Writing a client",
    "Writing a server",
    "Framing",
    "Text",
    "Names",
    "Grammar",
    "Requests",
    "Joining, leaving, roster",
    "Errors",
    "Order, pipelining, fences",
    "Limits",
    "Closing and half-closing",
    "Security considerations",
    "Versioning and history",
    "Annex A: telnet",
    "Annex B: many people and slow readers",
];

impl Level {
    pub const ALL: [Level; 4] = [Level::Core, Level::Telnet, Level::Overload, Level::Linechat];

    pub fn name(self) -> &'static str {
        ["core", "telnet", "overload", "linechat"][self as usize]
    }

    pub fn parse(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.name() == name)
    }

    /// The annex that is all of this level.
    fn section(self) -> Option<&'static str> {
        match self {
            Level::Core | Level::Linechat => None,
            Level::Telnet => Some(SECTIONS[15]),
            Level::Overload => Some(SECTIONS[16]),
        }
    }
}

/// A transcript, ready to be played.
pub struct Script {
    pub name: String,
    pub requirement: u32,
    pub level: Level,
    /// The section of PROTOCOL.md that it is about. `None`: it is about our own programs.
    pub section: Option<&'static str>,
    pub claim: String,
    /// This repository's server is started with these.
    pub options: Vec<String>,
    /// It takes so long that it is only played with SLOW=1.
    pub is_slow: bool,
    /// The suite itself is the server that linechat-client talks to.
    pub suite_is_server: bool,
    pub steps: Vec<Step>,
}

impl Script {
    /// A file of its own, which begins with `R4 core, Requests: what is claimed`.
    pub fn from_file(name: &str, text: &str) -> Result<Script, String> {
        let mut lines = text.lines().zip(1..).map(|(line, number)| (number, line));
        let title = lines.next().map_or("", |(_, title)| title);
        let (requirement, level, section, claim) = parse_title(title).ok_or(format!(
            "{name}:1: the first line must be like 'R4 core, Requests: what is claimed'"
        ))?;
        Script::parse(name.to_owned(), requirement, level, section, claim, lines)
    }

    /// The examples of PROTOCOL.md: every block fenced by "```transcript R4". It claims what the
    /// heading above it says, and has the level of its section.
    pub fn from_document(name: &str, text: &str) -> Result<Vec<Script>, String> {
        let mut scripts = Vec::new();
        let (mut section, mut heading) = ("", "");
        let mut lines = text.lines().zip(1..).map(|(line, number)| (number, line));
        while let Some((number, line)) = lines.next() {
            if line.starts_with('#') {
                heading = line.trim_start_matches('#').trim();
                section = if line.starts_with("## ") { heading } else { section };
            }
            let Some(requirement) = line.strip_prefix("```transcript R") else { continue };
            let requirement =
                requirement.parse().map_err(|_| format!("{name}:{number}: R what?"))?;
            let section = SECTIONS.iter().find(|known| **known == section).copied();
            let annex = |level: &Level| level.section().is_some() && level.section() == section;
            let level = Level::ALL.into_iter().find(annex).unwrap_or(Level::Core);
            let name = format!("{name}:{number}");
            let block: Vec<_> = lines.by_ref().take_while(|(_, line)| *line != "```").collect();
            let lines = block.into_iter();
            scripts.push(Script::parse(name, requirement, level, section, heading, lines)?);
        }
        Ok(scripts)
    }

    fn parse<'a>(
        name: String,
        requirement: u32,
        level: Level,
        section: Option<&'static str>,
        claim: &str,
        lines: impl Iterator<Item = (usize, &'a str)>,
    ) -> Result<Script, String> {
        let (claim, options, steps) = (claim.to_owned(), Vec::new(), Vec::new());
        let (is_slow, suite_is_server) = (false, false);
        let mut script = Script {
            name,
            requirement,
            level,
            section,
            claim,
            options,
            is_slow,
            suite_is_server,
            steps,
        };
        let is_step = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        let mut lines = lines.filter(|(_, line)| is_step(line)).peekable();
        while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("server --")) {
            script.options.extend(line.split_whitespace().skip(1).map(str::to_owned));
        }
        script.is_slow = lines.next_if(|(_, line)| *line == "slow").is_some();
        script.suite_is_server =
            lines.next_if(|(_, line)| *line == "the suite is the server").is_some();
        let file = script.file();
        script.steps = parse_steps(&mut lines, 0).map_err(|error| format!("{file}:{error}"))?;
        match script.written().iter().any(|step| step.action.asserts()) {
            true => Ok(script),
            false => Err(format!("{}: asserts nothing", script.name)),
        }
    }

    /// The file that it stands in.
    pub fn file(&self) -> String {
        self.name.split(':').next().unwrap_or_default().to_owned()
    }

    pub fn needs(&self, needs: Needs) -> bool {
        self.written().iter().any(|step| step.needs == needs)
    }

    pub fn does(&self, action: Action) -> bool {
        self.written().iter().any(|step| step.action == action)
    }

    /// It has very many people or much text.
    pub fn is_large(&self) -> bool {
        self.written().iter().any(|step| step.who.len() > CROWD || step.is_long())
    }

    /// It has so many people or steps that others are played first.
    pub fn is_lengthy(&self) -> bool {
        self.is_large() || self.unrolled().len() > LENGTHY
    }

    /// It takes long and enters no room, so it disturbs nothing that is played meanwhile.
    pub fn is_apart(&self) -> bool {
        let enters = |step: &&Step| {
            let welcome = |text: &Text| text.bytes().take(7).eq(*b"WELCOME");
            step.action == Action::BeInTheRoom || step.action.asserts() && welcome(&step.text)
        };
        self.is_slow && !self.written().iter().any(enters)
    }

    /// The steps in the order in which they are played, each with the round that it is played in.
    pub fn unrolled(&self) -> Vec<(usize, &Step)> {
        fn unroll<'a>(round: usize, steps: &'a [Step], into: &mut Vec<(usize, &'a Step)>) {
            for step in steps {
                match step.action {
                    Action::Repeat => {
                        (1..=step.number).for_each(|round| unroll(round, &step.block, into))
                    }
                    _ => into.push((round, step)),
                }
            }
        }
        let mut steps = Vec::new();
        unroll(0, &self.steps, &mut steps);
        steps
    }

    /// Every step as it is written, those of blocks included.
    pub fn written(&self) -> Vec<&Step> {
        fn collect<'a>(steps: &'a [Step], into: &mut Vec<&'a Step>) {
            for step in steps {
                into.push(step);
                collect(&step.block, into);
            }
        }
        let mut steps = Vec::new();
        collect(&self.steps, &mut steps);
        steps
    }
}

fn parse_title(title: &str) -> Option<(u32, Level, Option<&'static str>, &str)> {
    let (requirement, rest) = title.strip_prefix('R')?.split_once(' ')?;
    let end = rest.find([',', ':'])?;
    let (level, rest) = rest.split_at(end);
    let level = Level::parse(level)?;
    let (section, claim) = match rest.strip_prefix(", ") {
        None => (level.section(), rest.strip_prefix(": ")?),
        Some(rest) => {
            let named = |section: &&&str| {
                rest.strip_prefix(**section).is_some_and(|rest| rest.starts_with(": "))
            };
            let section = SECTIONS.iter().find(named)?;
            (Some(*section), &rest[section.len() + 2..])
        }
    };
    let is_complete = section.is_some() || level == Level::Linechat;
    is_complete.then_some((requirement.parse().ok()?, level, section, claim))
}

/// The steps that are indented by `depth`, up to the first that is less.
fn parse_steps<'a>(
    lines: &mut Peekable<impl Iterator<Item = (usize, &'a str)>>,
    depth: usize,
) -> Result<Vec<Step>, String> {
    let indentation = |line: &str| line.len() - line.trim_start_matches(' ').len();
    let mut steps = Vec::new();
    while let Some((number, line)) = lines.next_if(|(_, line)| indentation(line) >= depth) {
        let wrong = |what: String| format!("{number}: {what}: {}", line.trim_start());
        if indentation(line) > depth {
            return Err(wrong("indented, though no block begins before".to_owned()));
        }
        let mut step = Step::parse(number, line.trim_start()).map_err(wrong)?;
        if step.action == Action::Repeat {
            let inner = lines.peek().map_or(0, |(_, line)| indentation(line));
            if inner <= depth {
                return Err(wrong("the steps to repeat must be indented".to_owned()));
            }
            step.block = parse_steps(lines, inner)?;
        }
        steps.push(step);
    }
    Ok(steps)
}
