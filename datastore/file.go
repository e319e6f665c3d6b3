// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
)

// Timing of the watch.
const (
	// filePoll finds what notifications miss: network file systems, a replaced folder.
	filePoll = 5 * time.Second
	// fileSettle lets a writer finish what it does in several steps.
	fileSettle = 50 * time.Millisecond
	// maxLoggedEntries bounds the log lines about bad entries of one file.
	maxLoggedEntries = 10
)

// FileOptions of a File.
type FileOptions struct {
	Path string // required; symbolic links may not leave its folder
	// WatchFile follows changes, and lets the file appear after the start.
	WatchFile  bool
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // required

	poll   time.Duration // 0 = filePoll
	silent bool          // tests: no notifications
}

// File is the source behind the plugin type file-discovery: endpoints listed in a YAML or JSON file of at most 1 MiB
// (config.MaxFileBytes). When it starts, a bad entry is an error; later, bad entries are left out, and a file that
// cannot be read or parsed leaves everything as it was.
type File struct {
	opts    FileOptions
	log     *slog.Logger
	loads   *prometheus.CounterVec
	current prometheus.Gauge

	// Owned by Run.
	last    []byte // content that was last looked at
	read    bool   // last is set
	lastErr string // of reading, logged once
}

// DecodeFile reads the parameters of a file-discovery plugin: path (required) and watchFile (default false).
func DecodeFile(p config.Parameters) (FileOptions, error) {
	var params struct {
		Path      string `yaml:"path"`
		WatchFile bool   `yaml:"watchFile"`
	}
	if err := p.Decode(&params); err != nil {
		return FileOptions{}, err
	}
	if params.Path == "" {
		return FileOptions{}, p.Errorf("path", "is required")
	}
	return FileOptions{Path: params.Path, WatchFile: params.WatchFile}, nil
}

// NewFile makes the source; Run reads the file.
func NewFile(opts FileOptions) (*File, error) {
	if opts.Path == "" || opts.Logger == nil || opts.Registerer == nil {
		return nil, errors.New("file-discovery: Path, Logger and Registerer are required")
	}
	opts.poll = cmp.Or(opts.poll, filePoll)
	f := &File{
		opts: opts,
		log:  opts.Logger.With(slog.String("component", "datastore"), slog.String("file", opts.Path)),
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "baton_datastore_file_loads_total", Help: "Contents of the endpoints file that were looked at, by outcome: applied, partial (bad entries left out), failed.",
		}, []string{"outcome"}),
		current: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "baton_datastore_file_current", Help: "1 while the pool is what the endpoints file says, 0 while the file cannot be read, parsed or used in full.",
		}),
	}
	for _, outcome := range []string{"applied", "partial", "failed"} {
		f.loads.WithLabelValues(outcome)
	}
	return f, register(opts.Registerer, f.loads, f.current)
}

// Run implements [Source].
func (f *File) Run(ctx context.Context, publish func([]Wanted)) error {
	var watcher *fsnotify.Watcher
	var events chan fsnotify.Event
	var errs chan error
	if f.opts.WatchFile && !f.opts.silent {
		// Before the first read, so that no change in between is lost.
		if w, err := fsnotify.NewWatcher(); err != nil {
			f.log.LogAttrs(ctx, slog.LevelWarn, "endpoints file is only polled", slog.Any("err", err))
		} else {
			defer w.Close() //nolint:errcheck // nothing to do about it at the end
			watcher, events, errs = w, w.Events, w.Errors
			_ = w.Add(filepath.Dir(f.opts.Path)) // the folder may come later: every poll adds it again
		}
	}
	if err := f.start(ctx, publish); err != nil {
		return err
	}
	if !f.opts.WatchFile {
		<-ctx.Done()
		return nil
	}
	poll := time.NewTicker(f.opts.poll)
	defer poll.Stop()
	var settled <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			// Any event of the folder: a ConfigMap changes by a rename of ..data, not of the file.
			if settled == nil {
				settled = time.After(fileSettle)
			}
			continue
		case err := <-errs: // an overflow: look at once
			f.log.LogAttrs(ctx, slog.LevelDebug, "file watch", slog.Any("err", err))
		case <-settled:
			settled = nil
		case <-poll.C:
			if watcher != nil {
				_ = watcher.Add(filepath.Dir(f.opts.Path))
			}
		}
		f.reload(ctx, publish)
	}
}

// start reads the file for the first time: any problem is an error, except a watched file that is not there yet.
func (f *File) start(ctx context.Context, publish func([]Wanted)) error {
	data, err := f.readFile()
	if errors.Is(err, fs.ErrNotExist) && f.opts.WatchFile {
		f.log.LogAttrs(ctx, slog.LevelWarn, "endpoints file is not there yet; waiting for it")
		return nil
	}
	if err != nil {
		return err
	}
	f.last, f.read = data, true
	wanted, bad, err := parseFile(f.opts.Path, data)
	if err := errors.Join(append(bad, err)...); err != nil {
		return err
	}
	f.loads.WithLabelValues("applied").Inc()
	f.current.Set(1)
	publish(wanted)
	return nil
}

// reload publishes the file's endpoints if its content changed.
func (f *File) reload(ctx context.Context, publish func([]Wanted)) {
	data, err := f.readFile()
	if err != nil {
		f.read = false // whatever comes back counts as a change
		if f.lastErr != err.Error() {
			f.lastErr = err.Error()
			f.fail(ctx, err)
		}
		return
	}
	f.lastErr = ""
	if f.read && bytes.Equal(f.last, data) {
		return
	}
	f.last, f.read = data, true
	wanted, bad, err := parseFile(f.opts.Path, data)
	if err != nil {
		f.fail(ctx, err)
		return
	}
	if len(bad) == 0 {
		f.current.Set(1)
		f.loads.WithLabelValues("applied").Inc() // after what it counts is to be seen
	} else {
		f.current.Set(0)
		f.loads.WithLabelValues("partial").Inc()
	}
	for _, b := range bad[:min(len(bad), maxLoggedEntries)] {
		f.log.LogAttrs(ctx, slog.LevelWarn, "bad endpoint left out", slog.Any("err", b), slog.Int("bad", len(bad)))
	}
	publish(wanted)
}

// fail counts and logs a file that cannot be used.
func (f *File) fail(ctx context.Context, err error) {
	f.current.Set(0)
	f.loads.WithLabelValues("failed").Inc()
	f.log.LogAttrs(ctx, slog.LevelError, "endpoints file not usable; the endpoints stay as they are", slog.Any("err", err))
}

// readFile reads through os.Root: links inside the folder are followed (a ConfigMap is made of them), others refused.
func (f *File) readFile() ([]byte, error) {
	root, err := os.OpenRoot(filepath.Dir(f.opts.Path))
	if err != nil {
		return nil, fmt.Errorf("endpoints file %s: %w", f.opts.Path, err)
	}
	defer root.Close() //nolint:errcheck // read only
	file, err := root.Open(filepath.Base(f.opts.Path))
	if err != nil {
		return nil, fmt.Errorf("endpoints file %s: %w", f.opts.Path, err)
	}
	defer file.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(file, config.MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("endpoints file %s: %w", f.opts.Path, err)
	}
	return data, nil
}

var _ Source = (*File)(nil)
