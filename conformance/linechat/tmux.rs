//! Runs linechat-client in a real terminal emulator, tmux: types keys and reads the screen.
//!
//!     cargo test --test tmux -- --ignored        needs tmux

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{Server, STUCK};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use std::{io, thread};

/// A tmux window. Each test has a tmux server of its own.
struct Window {
    socket: String,
}

impl Window {
    fn open(test: &str, columns: u32, rows: u32, arguments: &str) -> Window {
        let client = env!("CARGO_BIN_EXE_linechat-client");
        // The shell outlives the client, so the test sees the screen that the client leaves.
        let command = format!(
            "before=$(stty -g); LC_ALL=C.UTF-8 {client} --no-time {arguments}; echo exit $?; \
             [ \"$(stty -g)\" = \"$before\" ] && echo as before; cat"
        );
        Window::run(test, columns, rows, &command)
    }

    /// Opens a window with a shell that has job control, and starts the client from it.
    fn open_in_shell(test: &str, arguments: &str) -> Window {
        let window = Window::run(test, 80, 24, "PS1='$ ' ENV= LC_ALL=C.UTF-8 exec sh -i");
        window.await_rows(&["$"]);
        let client = env!("CARGO_BIN_EXE_linechat-client");
        window.enter(&format!("PS1='% ' client={client} before=$(stty -g); clear"));
        window.await_rows(&["%"]);
        window.enter(&format!("$client --no-time {arguments}"));
        window
    }

    fn run(test: &str, columns: u32, rows: u32, command: &str) -> Window {
        let window = Window { socket: format!("linechat-{test}-{}", std::process::id()) };
        let (x, y) = (columns.to_string(), rows.to_string());
        window.tmux(&["new-session", "-d", "-x", &x, "-y", &y, command]);
        window
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        // The window uses UTF-8, whatever the locale of the test.
        command.args(["-u", "-f", "/dev/null", "-L", &self.socket]).args(arguments);
        let output = command.output().expect("tmux can be run");
        assert!(output.status.success(), "tmux {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn type_text(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn enter(&self, line: &str) {
        self.type_text(line);
        self.press(&["Enter"]);
    }

    /// Returns the rows of the window, and the column of the cursor.
    fn look(&self) -> (Vec<String>, usize) {
        let screen = self.tmux(&["capture-pane", "-p"]);
        let column = self.tmux(&["display-message", "-p", "#{cursor_x}"]);
        let rows = screen.trim_end().lines().map(|row| row.trim_end().to_owned());
        (rows.collect(), column.trim().parse().expect("a column"))
    }

    /// Waits until the last rows are these.
    fn await_rows(&self, expected: &[&str]) {
        let expected: Vec<_> = expected.iter().map(|row| (*row).to_owned()).collect();
        self.await_screen(&format!("{expected:#?}"), |rows| rows.ends_with(&expected));
    }

    /// Waits until the last row is as expected.
    fn await_last_row(&self, is_expected: impl Fn(&str) -> bool) {
        self.await_screen("the last row", |rows| rows.last().is_some_and(|row| is_expected(row)));
    }

    fn await_screen(&self, what: &str, is_expected: impl Fn(&[String]) -> bool) {
        let since = Instant::now();
        loop {
            let (rows, _) = self.look();
            if is_expected(&rows) {
                return;
            }
            assert!(since.elapsed() < STUCK, "{what} does not come: {rows:#?}");
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let _ = Command::new("tmux").args(["-L", &self.socket, "kill-server"]).status();
    }
}

/// Types a long line with wide characters and accents, with a message from bob between any two keys;
/// then resizes the window, which must neither leave a second copy of the line nor erase messages.
fn edits_during_a_flood(columns: u32, rows: u32) {
    let server = Server::start(&[]).expect("the server starts");
    let mut bob = Person::join(&server.address, "bob");
    let test = format!("flood-{columns}");
    let window = Window::open(&test, columns, rows, &format!("{} ana", server.address));
    bob.until("USERS 2");
    window.await_rows(&["Users online (2): ana, bob", ">"]);
    let text = "mañana 日本 👍 e\u{301}!";
    let mut count = 0;
    for round in 0..6 {
        for character in text.chars() {
            window.type_text(&character.to_string());
            count += 1;
            bob.say(&format!("MSG flood {count}"));
        }
        // Removes the last exclamation mark and inserts a word before the accent.
        window.press(&["BSpace", "Left", &format!("<{round}>"), "Home", "Right", "End"]);
    }
    let line: String = (0..6).map(|round| format!("mañana 日本 👍 <{round}>e\u{301}")).collect();
    window.await_rows(&[&format!("bob: flood {count}"), &shown(&line, columns)]);
    // Every row above holds a whole message, once and in order.
    let (seen, column) = window.look();
    let above = seen.len() - 1;
    let expected: Vec<_> =
        (count - above + 1..=count).map(|number| format!("bob: flood {number}")).collect();
    assert_eq!(seen[..above], expected);
    assert_eq!(column, width_of(&shown(&line, columns)));
    // tmux folds the line that is being typed; its rows are erased, and the messages stay.
    for columns in [60, 35, 20, 90] {
        window.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &rows.to_string()]);
        window.await_rows(&[&shown(&line, columns)]);
        let (seen, _) = window.look();
        let messages = seen.iter().filter(|row| **row == format!("bob: flood {count}")).count();
        assert_eq!(
            (messages, seen.iter().filter(|row| row.contains("日本")).count()),
            (1, 1),
            "{seen:#?}"
        );
    }
    window.press(&["Enter"]);
    assert_eq!(bob.until("MSG ana"), format!("MSG ana {line}"));
    window.press(&["C-d"]);
    bob.until("LEFT ana");
    window.await_rows(&["exit 0", "as before"]);
}

/// The client's last row for a line with the cursor at its end. A line longer than the window moves
/// by half a window at a time.
fn shown(line: &str, columns: u32) -> String {
    let space = columns as usize - "> ".len() - 1;
    let half = space.div_ceil(2);
    let skipped = width_of(line).saturating_sub(space).div_ceil(half) * half;
    let mut column = 0;
    let mut rest = line.chars().skip_while(|&c| (column < skipped, column += width(c)).0);
    match skipped {
        0 => format!("> {line}"),
        _ => format!("> <{}", rest.by_ref().skip(1).collect::<String>()),
    }
}

fn width(character: char) -> usize {
    match character {
        '\u{301}' => 0,
        '日' | '本' | '👍' => 2,
        _ => 1,
    }
}

fn width_of(text: &str) -> usize {
    text.chars().map(width).sum()
}

#[test]
#[ignore = "needs tmux"]
fn a_long_line_is_edited_during_a_flood() {
    edits_during_a_flood(80, 24);
    edits_during_a_flood(40, 10);
}

/// Suspends the client with `stop`. It must restore the terminal if `gives_back`, and must have its
/// keys again after the shell, which has changed the settings, resumes it.
fn suspends_and_resumes(test: &str, gives_back: bool, stop: impl Fn(&Window)) {
    let server = Server::start(&[]).expect("the server starts");
    let mut bob = Person::join(&server.address, "bob");
    let window = Window::open_in_shell(test, &format!("{} ana", server.address));
    window.await_rows(&["Users online (2): ana, bob", ">"]);
    window.type_text("half");
    window.await_rows(&["> half"]);
    stop(&window);
    window.await_rows(&["%"]);
    bob.say("MSG are you there?");
    window.enter("clear; [ \"$(stty -g)\" = \"$before\" ] && echo as before; stty sane");
    window.await_rows(if gives_back { &["as before", "%"] } else { &["%"] });
    window.enter("fg");
    window.await_rows(&["bob: are you there?", "> half"]);
    window.press(&["Left", "Left", "BSpace"]);
    window.type_text("e");
    window.await_rows(&["> helf"]);
    window.press(&["Enter"]);
    assert_eq!(bob.until("MSG ana"), "MSG ana helf");
    window.press(&["C-d"]);
    window.await_rows(&["%"]);
}

#[test]
#[ignore = "needs tmux"]
fn the_client_can_be_suspended() {
    suspends_and_resumes("ctrl-z", true, |window| window.press(&["C-z"]));
    suspends_and_resumes("sigstop", false, |window| {
        let pane = window.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let child = Command::new("pgrep").args(["-P", pane.trim()]).output().expect("pgrep");
        let child = String::from_utf8_lossy(&child.stdout).trim().parse().expect("a child");
        process::signal(child, "STOP").expect("the signal is sent");
    });
}

/// A proxy between clients and a server. The server can be replaced, and connections can be cut on the
/// client's side alone.
struct Relay {
    address: String,
    links: Arc<Mutex<Links>>,
}

#[derive(Default)]
struct Links {
    /// The server's address. `None` if connections are to be closed at once.
    server: Option<String>,
    /// Both ends of each connection: the client's and the server's.
    ends: Vec<[TcpStream; 2]>,
}

impl Relay {
    fn start() -> io::Result<Relay> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let links: Arc<Mutex<Links>> = Arc::default();
        let shared = links.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let mut links = shared.lock().unwrap();
                let server = links.server.as_ref().map(TcpStream::connect);
                let Some(Ok(server)) = server else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || io::copy(&mut from, &mut to));
                }
                links.ends.push([client, server]);
            }
        });
        Ok(Relay { address, links })
    }

    fn serve(&self, server: Option<&Server>) {
        self.links.lock().unwrap().server = server.map(|server| server.address.clone());
    }

    /// Ends all connections for the clients, or for the servers, which do not notice each other's.
    fn cut(&self, side: usize) {
        for ends in &self.links.lock().unwrap().ends {
            let _ = ends[side].shutdown(Shutdown::Both);
        }
    }
}

#[test]
#[ignore = "needs tmux"]
fn the_client_returns_when_its_server_starts_again_or_its_link_comes_back() {
    let mut server = Server::start(&[]).expect("the server starts");
    let relay = Relay::start().expect("a relay");
    relay.serve(Some(&server));
    let window = Window::open("returns", 80, 24, &format!("{} ana", relay.address));
    window.await_rows(&["Users online (1): ana", ">"]);
    window.type_text("half a");
    window.await_rows(&["> half a"]);
    relay.serve(None);
    process::signal(server.child.id(), "TERM").expect("the signal is sent");
    assert!(server.wait_within(STUCK).expect("the server ends").success());
    // The editor stays, and works.
    window.type_text(" line");
    window.await_last_row(|row| {
        row.starts_with("(not connected, attempt ") && row.ends_with("> half a line")
    });
    let server = Server::start(&[]).expect("the server starts");
    relay.serve(Some(&server));
    window.await_rows(&["Connected again, ana.", "Users online (1): ana", "> half a line"]);
    let mut bob = Person::join(&server.address, "bob");
    window.press(&["Enter"]);
    assert_eq!(bob.until("MSG ana"), "MSG ana half a line");
    // The server does not know that the link is cut, so the name is taken until it does.
    window.await_rows(&["ana: half a line", ">"]);
    relay.cut(0);
    window.await_last_row(|row| row.starts_with("(not connected, attempt "));
    relay.cut(1);
    assert_eq!(bob.until("LEFT"), "LEFT ana 1 disconnected");
    assert_eq!(bob.until("JOINED"), "JOINED ana 2");
    window.await_rows(&["Connected again, ana.", "Users online (2): ana, bob", ">"]);
    window.press(&["C-d"]);
    assert_eq!(bob.until("LEFT"), "LEFT ana 1 quit");
    window.await_rows(&["exit 0", "as before"]);
}
