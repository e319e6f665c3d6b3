// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startLimit = 20 * time.Second // for a child's first line, or its health
	stopLimit  = 3 * time.Second  // for a child that was asked to end
)

// launcher starts the parts of the comparison.
type launcher struct {
	self string   // this program
	env  []string // added for this program alone
	pin  bool
}

// child is a process that was started and must be stopped.
type child struct {
	name  string
	cmd   *exec.Cmd
	stdin io.Closer
	out   io.Closer     // its standard output
	lines *bufio.Reader // the same
	said  *tail         // the end of what it wrote to standard error
	ended chan struct{} // closed when it was waited for
}

// part starts a part of this program; see the package comment.
func (l *launcher) part(ctx context.Context, server bool, args ...string) (*child, error) {
	return l.start(ctx, server, l.self, l.env, args...)
}

// start runs a program. Where cores are pinned, servers get the first and the rest the others.
func (l *launcher) start(ctx context.Context, server bool, path string, env []string, args ...string) (*child, error) {
	c := &child{name: strings.Join(append([]string{path}, args[:min(1, len(args))]...), " "), said: &tail{}, ended: make(chan struct{})}
	if l.pin {
		cores := "0"
		if !server {
			cores = otherCores()
		}
		args = append([]string{"-c", cores, path}, args...)
		path = "taskset"
	}
	// The context does not end it: stop does, in order, and reaps it.
	c.cmd = exec.CommandContext(context.WithoutCancel(ctx), path, args...) //nolint:gosec // the bench's own programs
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.Stderr = c.said
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C at the terminal reaches us alone
	endWithParent(c.cmd.SysProcAttr)
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	c.stdin, c.out, c.lines, c.cmd.Stdout = stdin, out, bufio.NewReader(out), in
	err = c.cmd.Start()
	_ = in.Close() // the child has its own
	if err != nil {
		_ = out.Close()
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	go func() {
		_ = c.cmd.Wait() // how it ended is told by what it said
		close(c.ended)
	}()
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// read decodes the child's next line, a JSON value, within limit.
func (c *child) read(ctx context.Context, limit time.Duration, v any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s: no answer within %v", c.name, limit))
	defer cancel()
	read := make(chan error, 1)
	go func() {
		line, err := c.lines.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(line, v)
		}
		read <- err
	}()
	select {
	case err := <-read:
		if err != nil {
			return c.failure(err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// failure adds what the child said last.
func (c *child) failure(err error) error {
	return errors.Join(fmt.Errorf("%s: %w", c.name, err), errors.New(c.said.String()))
}

// stop asks the child to end, then makes it, and returns when it was reaped.
func (c *child) stop() {
	defer c.out.Close()
	c.stdin.Close()
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-c.ended:
		return
	case <-time.After(stopLimit):
	}
	_ = c.cmd.Process.Kill()
	<-c.ended
}

// tail keeps the last bytes written to it. Safe for concurrent use.
type tail struct {
	mu   sync.Mutex
	kept []byte // guarded by mu
}

const tailBytes = 2 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, p...)
	if over := len(t.kept) - tailBytes; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.kept))
}
