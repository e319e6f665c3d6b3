// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// The values of disaggregation.mode.
const (
	modeAuto        = "auto"
	modeOrchestrate = "orchestrate"
	modeHeaders     = "headers"
	modeOff         = "off"
)

// settings is a configuration ready for use. Immutable: a reload makes a new one.
type settings struct {
	config.Disaggregation
	wires     map[string]wire // by engine; "" is every other engine
	encoder   encoder
	transport *transport
	forward   []forwarded
}

// wire is a connector in use.
type wire struct {
	connectors.Connector
	connectors.Traits
}

// forwarded is a client header that sub-requests carry.
type forwarded struct{ name, canonical string }

// newSettings prepares c. The transport of old, if any, is used on where nothing about it changed.
func newSettings(c *config.Disaggregation, permitted func(context.Context, netip.AddrPort) bool, old *settings) (*settings, error) {
	s := &settings{Disaggregation: *c, wires: make(map[string]wire, len(c.KVConnector))}
	var errs []error
	if !slices.Contains([]string{modeAuto, modeOrchestrate, modeHeaders, modeOff}, c.Mode) {
		errs = append(errs, fmt.Errorf("disaggregation.mode: %q is not a mode", c.Mode))
	}
	for _, engine := range slices.Sorted(maps.Keys(c.KVConnector)) {
		path := "disaggregation.kvConnector"
		if engine != "" {
			path += "." + engine
		}
		connector, traits, err := connectors.Lookup(c.KVConnector[engine])
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
			continue
		}
		s.wires[engine] = wire{connector, traits}
	}
	if c.ECConnector != "" {
		connector, traits, err := connectors.LookupEncoder(c.ECConnector)
		if err != nil {
			errs = append(errs, fmt.Errorf("disaggregation.ecConnector: %w", err))
		}
		s.encoder = encoder{connector, traits}
	}
	for i, name := range c.Transport.ForwardHeaders {
		name = strings.ToLower(name)
		if ours(name) {
			errs = append(errs, fmt.Errorf("disaggregation.transport.forwardHeaders[%d]: %s is set by Baton itself or ends at each hop", i, name))
		}
		s.forward = append(s.forward, forwarded{name, http.CanonicalHeaderKey(name)})
	}
	var err error
	if s.transport, err = newTransport(c, permitted, old); err != nil {
		errs = append(errs, fmt.Errorf("disaggregation.transport: %w", err))
	}
	return s, errors.Join(errs...)
}

// ours reports whether a client's copy of a header must not reach a sub-request.
func ours(name string) bool {
	switch name {
	case "accept", "accept-encoding", "content-encoding", "content-length", "content-type", "expect", "host",
		"connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer", "transfer-encoding",
		"upgrade", "user-agent", "idempotency-key", "x-idempotency-key", "x-request-id", "traceparent", "tracestate",
		"x-data-parallel-rank", HeaderAttempt, HeaderDepth, HeaderPrefiller, HeaderEncoders:
		return true
	}
	return strings.HasPrefix(name, ":")
}

// wire returns the connector for an engine.
func (s *settings) wire(engine string) (wire, bool) {
	w, ok := s.wires[engine]
	if !ok {
		w, ok = s.wires[""]
	}
	return w, ok
}
