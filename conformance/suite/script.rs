//! Reads transcripts. `conformance/README.md` describes their language.

use crate::forms::Step;

/// More bytes than telnet takes at once.
pub const LONG: usize = 200_000;

/// What a transcript asks of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// What clients and servers need to talk to each other.
    #[default]
    Core,
    /// PROTOCOL.md, "Annex A".
    Telnet,
    /// PROTOCOL.md, "Annex B".
    Overload,
    /// What this repository's server and client do apart from the protocol.
    Linechat,
}

impl Level {
    pub const ALL: [Level; 4] = [Level::Core, Level::Telnet, Level::Overload, Level::Linechat];

    pub fn name(self) -> &'static str {
        ["core", "telnet", "overload", "linechat"][self as usize]
    }

    pub fn parse(name: &str) -> Result<Level, String> {
        let level = Level::ALL.into_iter().find(|level| level.name() == name);
        level.ok_or(format!("a level is core, telnet, overload or linechat, not {name}"))
    }

    /// The annex that is all of this level.
    fn section(self) -> Option<&'static str> {
        match self {
            Level::Core | Level::Linechat => None,
            Level::Telnet => Some("Annex A: telnet"),
            Level::Overload => Some("Annex B: many people and slow readers"),
        }
    }
}

/// A transcript, ready to be played.
#[derive(Default)]
pub struct Script {
    pub name: String,
    pub requirement: u32,
    pub level: Level,
    /// The section of PROTOCOL.md that it is about. `None`: it is about our own programs.
    pub section: Option<String>,
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
        let mut lines = (1..).zip(text.lines());
        let title = lines.next().map_or("", |(_, title)| title);
        let script = parse_title(title).ok_or(format!(
            "{name}:1: the first line must be like 'R4 core, Requests: what is claimed'"
        ))?;
        Script { name: name.to_owned(), ..script }.with_steps(lines.collect())
    }

    /// The examples of PROTOCOL.md: every block fenced by "```transcript R4". It claims what the
    /// heading above it says, and has the level of its section.
    pub fn from_document(name: &str, text: &str) -> Result<Vec<Script>, String> {
        let mut scripts = Vec::new();
        let (mut section, mut heading) = ("", "");
        let mut lines = (1..).zip(text.lines());
        while let Some((number, line)) = lines.next() {
            if line.starts_with('#') {
                heading = line.trim_start_matches('#').trim();
                section = if line.starts_with("## ") { heading } else { section };
            }
            let Some(requirement) = line.strip_prefix("```transcript R") else { continue };
            let name = format!("{name}:{number}");
            let requirement =
                requirement.parse().map_err(|_| format!("{name}: a number must follow R"))?;
            let annex = |level: &Level| level.section() == Some(section);
            let level = Level::ALL.into_iter().find(annex).unwrap_or_default();
            let (section, claim) = (Some(section.to_owned()), heading.to_owned());
            let script = Script { name, requirement, level, section, claim, ..Script::default() };
            let block = lines.by_ref().take_while(|(_, line)| *line != "```").collect();
            scripts.push(script.with_steps(block)?);
        }
        Ok(scripts)
    }

    /// Reads these lines: what the transcript needs, then its steps.
    fn with_steps(mut self, mut lines: Vec<(usize, &str)>) -> Result<Script, String> {
        lines.retain(|(_, line)| !matches!(line.trim_start().chars().next(), None | Some('#')));
        let mut rest = lines.as_slice();
        while let [(_, line), after @ ..] = rest {
            match *line {
                "slow" => self.is_slow = true,
                "the suite is the server" => self.suite_is_server = true,
                _ if line.starts_with("server --") => {
                    self.options.extend(line.split_whitespace().skip(1).map(str::to_owned));
                }
                _ => break,
            }
            rest = after;
        }
        self.steps = parse_steps(rest, 0).map_err(|error| format!("{}:{error}", self.file()))?;
        Ok(self)
    }

    /// The file that it stands in.
    pub fn file(&self) -> &str {
        self.name.split(':').next().unwrap_or_default()
    }

    /// A rough measure of the work. Each of the clients that join in one step is told of the others.
    pub fn size(&self) -> usize {
        self.steps.iter().map(|step| step.who.len().pow(2) + step.bytes.len() / 100).sum()
    }
}

/// A script without its name and steps.
fn parse_title(title: &str) -> Option<Script> {
    let (requirement, rest) = title.strip_prefix('R')?.split_once(' ')?;
    let (level, rest) = rest.split_at(rest.find([',', ':'])?);
    let level = Level::parse(level).ok()?;
    let (section, claim) = match level {
        Level::Core => {
            let (section, claim) = rest.strip_prefix(", ")?.split_once(": ")?;
            (Some(section), claim)
        }
        _ => (level.section(), rest.strip_prefix(": ")?),
    };
    let (section, claim) = (section.map(str::to_owned), claim.to_owned());
    let requirement = requirement.parse().ok()?;
    Some(Script { requirement, level, section, claim, ..Script::default() })
}

/// Steps that are indented below `20 times` are repeated. `{n}` is the number of the round.
fn parse_steps(mut lines: &[(usize, &str)], round: usize) -> Result<Vec<Step>, String> {
    let indentation = |line: &str| line.len() - line.trim_start_matches(' ').len();
    let depth = lines.first().map_or(0, |(_, line)| indentation(line));
    let mut steps = Vec::new();
    while let [(number, line), rest @ ..] = lines {
        let (is_level, line) = (indentation(line) == depth, line.trim_start());
        let wrong = |what: String| format!("{number}: {what}: {line}");
        let block = rest.iter().take_while(|(_, line)| indentation(line) > depth).count();
        let (block, rest) = rest.split_at(block);
        match line.strip_suffix(" times").and_then(|times| times.parse::<usize>().ok()) {
            Some(times) if is_level && !block.is_empty() => {
                for round in 1..=times {
                    steps.extend(parse_steps(block, round)?);
                }
            }
            None if is_level && block.is_empty() => {
                let source = line.replace("{n}", &round.to_string());
                steps.push(Step::parse(*number, &source).map_err(wrong)?);
            }
            _ => return Err(wrong("the steps to repeat, and no others, are indented".to_owned())),
        }
        lines = rest;
    }
    Ok(steps)
}
