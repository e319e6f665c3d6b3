// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/baton-epp/baton/config"
)

// Builder is what a constructor may ask for while it makes one plugin.
type Builder struct {
	// Name and Type of the plugin that is made.
	Name, Type string

	a    *assembly
	line int
}

// built is a plugin and where it stands.
type built struct {
	name, kind string
	line       int
	value      any
}

// assembly makes a Scheduler out of a configuration, collecting every problem.
type assembly struct {
	options  *Options
	config   *config.Config
	registry Registry
	problems []problem
	warnings []string

	plugins  map[string]*built // by name; a nil value is being made or could not be made
	order    []*built          // in file order, those made without being configured behind them
	matchers []Matcher
	columns  map[string]int // by producer name
	answers  []answer
}

type problem struct {
	line int
	err  error
}

func newAssembly(o *Options, r Registry) *assembly {
	return &assembly{options: o, config: o.Config, registry: r, plugins: map[string]*built{}, columns: map[string]int{}}
}

// fail notes a problem at a path of the file.
func (a *assembly) fail(line int, path, format string, args ...any) {
	a.problems = append(a.problems, problem{line, errors.New(a.at(line, path) + fmt.Sprintf(format, args...))})
}

// at is the beginning of a message, in the form of package config.
func (a *assembly) at(line int, path string) string {
	if line == 0 {
		return path + ": "
	}
	return fmt.Sprintf("%s:%d: %s: ", cmp.Or(a.options.File, "config"), line, path)
}

// assemble fills s.
func (a *assembly) assemble(s *Scheduler) error {
	for i := range a.config.Plugins {
		if p := &a.config.Plugins[i]; p.Type == typePrefixProducer {
			a.make(i) // the first one is the default producer, column 0, wherever it stands
			break
		}
	}
	for i := range a.config.Plugins {
		a.make(i)
	}
	profiles := a.profiles(s)
	a.handler(s, profiles)
	if len(a.problems) > 0 {
		slices.SortStableFunc(a.problems, func(x, y problem) int { return x.line - y.line })
		errs := make([]error, len(a.problems))
		for i, p := range a.problems {
			errs[i] = p.err
		}
		return errors.Join(errs...)
	}
	s.matchers, s.answers, s.warnings = a.matchers, a.answers, a.warnings
	s.inflight = defaultInflight()
	for _, b := range a.order {
		s.plugins = append(s.plugins, *b)
		if l, ok := b.value.(Learner); ok {
			s.learners = append(s.learners, l)
		}
		if p, ok := b.value.(*inflightLoad); ok {
			s.inflight = p
		}
	}
	return nil
}

// make makes the i-th configured plugin, once.
func (a *assembly) make(i int) {
	p := &a.config.Plugins[i]
	if _, done := a.plugins[p.Name]; done {
		return
	}
	a.plugins[p.Name] = nil
	construct, known := a.registry[p.Type]
	if !known {
		a.fail(p.Line, fmt.Sprintf("plugins[%d].type", i), "%s", a.registry.unknown(p.Type))
		return
	}
	a.construct(&built{name: p.Name, kind: p.Type, line: p.Line}, construct, p.Parameters)
}

// inject makes a plugin of the given type that the file does not define.
func (a *assembly) inject(kind string) *built {
	b := &built{name: kind, kind: kind}
	if construct, known := a.registry[kind]; known {
		return a.construct(b, construct, config.Parameters{})
	}
	a.fail(0, kind, "plugin type is not registered")
	return nil
}

func (a *assembly) construct(b *built, construct Constructor, raw config.Parameters) *built {
	value, err := construct(&Builder{Name: b.name, Type: b.kind, a: a, line: b.line}, raw)
	if err != nil {
		a.problems = append(a.problems, problem{b.line, err})
		return nil
	}
	b.value = value
	a.plugins[b.name] = b
	a.order = append(a.order, b)
	if m, ok := value.(Matcher); ok {
		a.addColumn(b, m)
	}
	return b
}

func (a *assembly) addColumn(b *built, m Matcher) {
	if len(a.matchers) == MaxProducers {
		a.fail(b.line, b.name, "too many prefix producers, at most %d", MaxProducers)
		return
	}
	a.columns[b.name] = len(a.matchers)
	a.matchers = append(a.matchers, m)
}

// find returns the plugin of that name, making it if its turn has not come; nil when there is none or it is broken.
func (a *assembly) find(name string) *built {
	if i := slices.IndexFunc(a.config.Plugins, func(p config.Plugin) bool { return p.Name == name }); i >= 0 {
		a.make(i)
	}
	return a.plugins[name]
}

// defined reports whether the file defines a plugin of that name.
func (a *assembly) defined(name string) bool {
	return slices.ContainsFunc(a.config.Plugins, func(p config.Plugin) bool { return p.Name == name })
}

// Prefix returns the column of the prefix producer with that name. An empty name is the default producer: the first
// one in the file, or one with llm-d's defaults that is made now.
func (b *Builder) Prefix(name string) (column int, err error) {
	if name == "" || name == typePrefixProducer && !b.a.defined(name) {
		return b.DefaultPrefix(nil)
	}
	if !b.a.defined(name) {
		return 0, fmt.Errorf("no plugin is named %q", name)
	}
	b.a.find(name)
	column, ok := b.a.columns[name]
	if !ok {
		return 0, fmt.Errorf("plugin %q is no prefix producer", name)
	}
	return column, nil
}

// DefaultPrefix is Prefix("") for a plugin that carries the parameters itself (an older file's prefix-cache-scorer):
// they count where no producer is defined. p nil = the defaults.
func (b *Builder) DefaultPrefix(p *PrefixParameters) (column int, err error) {
	if len(b.a.matchers) > 0 {
		if p != nil {
			b.Warn("its index parameters are ignored: the file defines a prefix producer")
		}
		return 0, nil
	}
	if p == nil {
		p = new(DefaultPrefixParameters())
	}
	producer := &Builder{Name: typePrefixProducer, Type: typePrefixProducer, a: b.a}
	made := &built{name: producer.Name, kind: producer.Type, value: producer.producer(p)}
	b.a.order = append(b.a.order, made)
	b.a.addColumn(made, made.value.(Matcher)) //nolint:forcetypeassert // a *prefixProducer is one
	return 0, nil
}

// decider returns the decider of that name.
func (b *Builder) decider(name string) (Decider, error) {
	if !b.a.defined(name) {
		return nil, fmt.Errorf("no plugin is named %q", name)
	}
	p := b.a.find(name)
	if p == nil {
		return always{}, nil // it has a problem of its own, which is reported already
	}
	d, ok := p.value.(Decider)
	if !ok {
		return nil, fmt.Errorf("plugin %q is no decider", name)
	}
	return d, nil
}

// Warn notes something about the plugin that an operator should know although the file loads.
func (b *Builder) Warn(format string, args ...any) {
	b.a.warnings = append(b.a.warnings, b.a.at(b.line, b.Name)+fmt.Sprintf(format, args...))
}

// Answer adds a header to the response of every request that a learner of b's plugin wants to recognise later; f makes
// it for the endpoint that served.
func (b *Builder) Answer(f answer) { b.a.answers = append(b.a.answers, f) }

// Deprecated wraps a constructor whose type will go away; instead says what to do.
func Deprecated(construct Constructor, instead string) Constructor {
	return func(b *Builder, p config.Parameters) (any, error) {
		b.Warn("type %s is deprecated: %s", b.Type, instead)
		return construct(b, p)
	}
}
