//! README.md against the programs: the sample conversation, the tables of options and of the
//! console's lines, and the exit statuses.
//!
//! The sample screen of linechat-client is played by `terminal-line-survives-what-arrives.txt`.

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::{start, Person};
use process::{signal, STUCK};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::Duration;

const README: &str = include_str!("../../README.md");
const SERVER: &str = env!("CARGO_BIN_EXE_linechat-server");
const CLIENT: &str = env!("CARGO_BIN_EXE_linechat-client");

/// README from the first place that holds `mark`.
fn from(mark: &str) -> &'static str {
    let start = README.find(mark).unwrap_or_else(|| panic!("README.md does not hold {mark:?}"));
    &README[start..]
}

/// The two cells of each row of the table with this heading, in this section.
fn table(section: &str, heading: &str) -> Vec<(String, String)> {
    let table = from(section).lines().skip_while(|line| !line.starts_with(heading));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let row = row.replace("\\|", "\0");
        let cells: Vec<_> = row.split('|').map(|it| it.trim().replace('\0', "|")).collect();
        let [_, first, second, _] = &cells[..] else { panic!("not two cells: {row}") };
        (first.clone(), second.clone())
    })
    .collect()
}

/// The parts of `text` between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Runs a program with this input. Returns its exit status and its standard output.
fn run(program: &str, arguments: &str, input: &str) -> (Option<i32>, String) {
    let mut command = Command::new(program);
    command.args(arguments.split(' ')).env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("the program can be started");
    // A program that refuses its arguments does not read its input.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("the program ends");
    (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
}

/// The options that `--help` lists, apart from `--help` and `--version`, and their meanings.
fn options(program: &str) -> Vec<(String, String)> {
    let (status, help) = run(program, "--help", "");
    assert_eq!(status, Some(0));
    let mut options: Vec<(String, String)> = Vec::new();
    let lines = help.lines().skip_while(|line| *line != "Options:").skip(1);
    for line in lines.take_while(|line| !line.is_empty()).map(str::trim) {
        let Some((name, rest)) = line.split_once(' ').filter(|_| line.starts_with("--")) else {
            let (_, meaning) = options.last_mut().expect("an option before its second line");
            *meaning += &format!(" {line}");
            continue;
        };
        // An argument is in capitals, or a choice such as `en|pt`.
        let is_argument = |word: &&str| word.contains('|') || word.starts_with(char::is_uppercase);
        let argument = rest.split(' ').next().filter(is_argument);
        let option = argument.map_or(name.to_owned(), |argument| format!("{name} {argument}"));
        let meaning = line[option.len()..].trim().to_owned();
        options.push((format!("`{option}`"), meaning));
    }
    options.retain(|(option, _)| option != "`--help`" && option != "`--version`");
    options
}

#[test]
fn tables_of_options_are_those_of_help() {
    assert_eq!(table("## The client", "| option |"), options(CLIENT));
    assert_eq!(table("## The server", "| option |"), options(SERVER));
}

#[test]
fn sample_conversation_is_what_the_server_sends() {
    let server = start("");
    let sample = from("    HELLO linechat/1").lines().take_while(|line| !line.is_empty());
    let mut ana = Person::connect(&server.address);
    let mut bob = Person::connect(&server.address);
    for line in sample.map(str::trim) {
        if let Some(request) = line.strip_suffix('←') {
            ana.say(request.trim());
            continue;
        }
        match line.split(' ').next() {
            Some("JOINED") => bob.say("NAME bob"),
            Some("MSG") => bob.say("MSG hello!"),
            Some("LEFT") => bob.say("QUIT"),
            _ => {}
        }
        assert_eq!(ana.line(), line);
    }
    assert!(ana.ends());
}

/// A line of the console as README's table writes it. The names in this test are ana and eve, and
/// the message is hello.
fn form(line: &str) -> String {
    let (line, quote) = line.split_once('"').map_or((line, ""), |(line, _)| (line, "\"TEXT\""));
    let words = line.split(' ').map(|word| match word {
        _ if word.parse::<SocketAddr>().is_ok() => "ADDR".to_owned(),
        _ if word.parse::<u64>().is_ok() => "N".to_owned(),
        _ => word.replace("ana", "NAME").replace("eve", "NAME").replace("hello", "TEXT"),
    });
    words.collect::<Vec<_>>().join(" ") + quote
}

#[test]
fn table_of_the_console_has_what_the_console_shows() {
    let mut forms = BTreeSet::new();
    for (lines, meaning) in table("## The server", "| line of the console") {
        for line in quoted(&lines) {
            match line.contains("REASON") {
                true => forms.extend(quoted(&meaning).map(|it| line.replace("REASON", it))),
                false => drop(forms.insert(line.to_owned())),
            }
        }
    }
    let mut shown = BTreeSet::new();
    let mut look_up = |line: &str| {
        assert!(forms.contains(&form(line)), "not in README.md: {line}");
        shown.insert(form(line));
    };

    let mut server = start("--verbose --max-clients 3 --name-timeout 1");
    look_up(&format!("listening on {}", server.address));
    let mut ana = Person::join(&server.address, "ana");
    let guest = Person::connect(&server.address);
    let other = Person::connect(&server.address);
    assert!(Person::connect(&server.address).is_refused());
    assert!(guest.ends() && other.ends());
    let mut browser = Person::connect(&server.address);
    browser.say("GET / HTTP/1.1");
    assert!(browser.ends());
    Person::connect(&server.address).leave();
    Person::join(&server.address, "eve").leave();
    drop(Person::connect(&server.address));
    drop(Person::join(&server.address, "eve"));
    ana.until("LEFT eve 1 disconnected");
    ana.say("MSG hello");
    ana.fence();
    signal(server.child.id(), "TERM").expect("the signal is sent");
    while let Some(line) = server.next_line().expect("the console ends") {
        look_up(&line);
    }
    assert!(server.wait_within(STUCK).is_some_and(|status| status.success()));

    // Without --verbose: a flood of long lines would fill the console, which drops lines then.
    let mut server = start("--max-clients 4000000000");
    let mut ana = Person::join(&server.address, "ana");
    let _eve = Person::join(&server.address, "eve");
    // Eve reads no more.
    ana.socket().set_nonblocking(true).expect("does not block");
    let flood = format!("MSG {}\n", "x".repeat(3900)).repeat(16);
    let is_budget = |line: &String| line.starts_with("the budget applies");
    let mut line = None;
    while !line.as_ref().is_some_and(is_budget) {
        // The rest of a cut line is part of the next one, which may be refused.
        let _ = ana.socket().write(flood.as_bytes());
        line = server.next_line_within(Duration::from_millis(1)).unwrap_or_default();
        line.iter().for_each(|line| look_up(line));
    }
    // The server takes a minute to show the first of these; a unit test shows the second.
    let elsewhere =
        ["ADDR NAME left (slow), N online", "N lines dropped: the console was not read"];
    assert!(forms.difference(&shown).eq(elsewhere), "{:?}", forms.difference(&shown));
}

#[test]
fn exit_statuses_are_those_of_the_programs() {
    let documented = |section: &str, status: i32, cause: &str| {
        let text = from(section).split_once("Exit status: ").expect("exit statuses").1;
        let text = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
        let mut parts = text.split("; ").filter(|part| part.starts_with(&status.to_string()));
        assert!(parts.any(|part| part.contains(cause)), "{status} {cause}: {text}");
    };
    let mut server = start("");
    let address = &*server.address.clone();
    // Nothing listens here any more.
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
    let (there, nowhere) = (format!("{address} bot"), format!("{closed} bot"));
    for (program, status, cause, arguments, input) in [
        (CLIENT, 0, "you left", &*there, "backup done\n"),
        (CLIENT, 1, "a line was refused", &there, "\u{1}\n"),
        (CLIENT, 1, "not reached", &nowhere, ""),
        (CLIENT, 2, "wrong usage", address, "no name\n"),
        (CLIENT, 2, "wrong usage", "--nonsense", ""),
        (SERVER, 1, "failure", address, ""),
        (SERVER, 2, "wrong usage", "--nonsense", ""),
    ] {
        let section = if program == CLIENT { "## The client" } else { "## The server" };
        documented(section, status, cause);
        assert_eq!(run(program, arguments, input), (Some(status), String::new()), "{cause}");
    }
    documented("## The server", 0, "stopped");
    let mut ana = Person::join(address, "ana");
    signal(server.child.id(), "HUP").expect("the signal is sent");
    ana.fence();
    signal(server.child.id(), "INT").expect("the signal is sent");
    ana.until("BYE ");
    assert!(ana.ends());
    assert_eq!(server.wait_within(STUCK).and_then(|status| status.code()), Some(0));
}
