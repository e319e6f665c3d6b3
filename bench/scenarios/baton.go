// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/baton-epp/baton/app"
	"github.com/baton-epp/baton/internal/gatewaytest"
)

// batonConfig disaggregates every request.
const batonConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, parameters: {path: endpoints.yaml}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: prefill-filter}
- {type: decode-filter}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer: {discovery: {pluginRef: file-discovery}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
`

const headerOutcome = "x-baton-outcome"

// throughBaton are scenarios in which a client's request goes to Baton, which makes both legs of it.
func throughBaton() []scenario {
	return []scenario{
		{"baton-pair", "through Baton: a request", "pulled blocks late failed", func(ctx context.Context, t *trial) error {
			_, err := t.viaBaton(ctx, t.completion(promptTokens))
			return err
		}},
		{"baton-n", "through Baton: the client sends `n: 2`", "pulled blocks late failed", func(ctx context.Context, t *trial) error {
			r, err := t.viaBaton(ctx, several(t.completion(promptTokens)))
			if err != nil {
				return err
			}
			t.add("choices", strconv.Itoa(len(r.texts)))
			return nil
		}},
		{"baton-min-tokens", "through Baton: the client sends `min_tokens: 3`", "pulled blocks late failed", func(ctx context.Context, t *trial) error {
			_, err := t.viaBaton(ctx, t.completion(promptTokens).with("min_tokens", 3))
			return err
		}},
		{"baton-cancel", "through Baton: the client goes during prefill", "pulled blocks", batonCancelled},
	}
}

// baton is a Baton on the two servers, in this process, and a gateway before it.
type baton struct {
	dir     string
	gateway *gatewaytest.Gateway
	stop    context.CancelFunc
	ended   chan error // what Run returned
}

// viaBaton sends q through Baton and compares the answer.
func (t *trial) viaBaton(ctx context.Context, q request) (*reply, error) {
	b, err := t.throughBaton(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	got, err := b.gateway.Do(ctx, q.path, q.encode())
	if err != nil {
		return nil, fmt.Errorf("through Baton: %w", err)
	}
	outcome := got.Header.Get(headerOutcome)
	if outcome == "" {
		outcome = "none"
	}
	t.add("outcome", outcome)
	r := newReply(got.Status, got.Body)
	return r, t.compare(ctx, "answer", q, r)
}

func batonCancelled(ctx context.Context, t *trial) error {
	b, err := t.throughBaton(ctx)
	if err != nil {
		return err
	}
	q := t.completion(longPrompt)
	return t.cancelMidway(ctx, func(ctx context.Context) error {
		_, err := b.gateway.Do(ctx, q.path, q.encode())
		return err
	})
}

// throughBaton starts Baton when it is needed first.
func (l *lab) throughBaton(ctx context.Context) (*baton, error) {
	if l.baton != nil {
		return l.baton, nil
	}
	dir, err := os.MkdirTemp("", "baton-scenarios-")
	if err != nil {
		return nil, err //nolint:wrapcheck // names the folder
	}
	b := &baton{dir: dir, ended: make(chan error, 1)}
	if err := errors.Join(l.writeConfig(dir), b.start(ctx)); err != nil {
		return nil, errors.Join(fmt.Errorf("start of Baton: %w", err), os.RemoveAll(dir))
	}
	l.baton = b
	return b, nil
}

func (b *baton) start(ctx context.Context) error {
	o := app.DefaultOptions()
	o.ConfigFile, o.BindAddress, o.GRPCPort, o.HealthPort, o.MetricsPort = filepath.Join(b.dir, "epp.yaml"), "127.0.0.1", 0, -1, 0
	o.SecureServing, o.DrainDelay, o.DrainTimeout = false, 0, time.Second
	a, err := app.New(o)
	if err != nil {
		return err //nolint:wrapcheck // wrapped by the caller
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx)) // close ends it, in order
	b.stop = stop
	go func() { b.ended <- a.Run(run) }()
	known := func() bool { return a.Snapshot().Synced && len(a.Snapshot().Endpoints) == 2 }
	if !poll(ctx, scrapeLimit, known) {
		b.stop()
		return errors.Join(errors.New("the two servers are not known"), <-b.ended)
	}
	b.gateway, err = gatewaytest.New(gatewaytest.Options{Picker: a.Addr().String(), Request: gatewaytest.Duplex, Response: gatewaytest.None})
	if err != nil {
		b.stop()
		return errors.Join(err, <-b.ended)
	}
	return nil
}

func (b *baton) close() error {
	err := b.gateway.Close()
	b.stop()
	return errors.Join(err, <-b.ended, os.RemoveAll(b.dir)) //nolint:gosec // the folder that was made
}

// writeConfig writes Baton's configuration and the list of endpoints.
func (l *lab) writeConfig(dir string) error {
	var text strings.Builder
	text.WriteString("endpoints:\n")
	for _, e := range []struct{ role, url string }{{"prefill", l.prefill.url}, {"decode", l.decode.url}} {
		u, err := url.Parse(e.url)
		if err != nil {
			return err //nolint:wrapcheck // names the URL
		}
		host, port, err := net.SplitHostPort(u.Host)
		if err != nil {
			return err //nolint:wrapcheck // names the address
		}
		fmt.Fprintf(&text, "- {name: %s, namespace: default, address: %q, port: %q, labels: {llm-d.ai/role: %s}}\n", e.role, host, port, e.role)
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "endpoints.yaml"), []byte(text.String()), 0o600),
		os.WriteFile(filepath.Join(dir, "epp.yaml"), []byte(batonConfig), 0o600),
	)
}
