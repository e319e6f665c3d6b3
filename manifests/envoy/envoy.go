// SPDX-License-Identifier: Apache-2.0

// Package envoy holds the static Envoy configurations that Baton ships, for Envoy without Kubernetes.
// The YAML files beside it are complete and can be copied; they are rendered from envoy.yaml.tmpl with
// [Defaults], which a test checks. The demo and the tests on a real Envoy render the same template with
// ports of their own, so what is tested is what is shipped.
package envoy

import (
	"bytes"
	_ "embed"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"
)

// The shipped configurations, named as their files without ".yaml".
const (
	// QuietOverrideHost streams requests and routes among known endpoints. It is the one to start from.
	QuietOverrideHost = "quiet-override-host"
	// QuietOriginalDst streams requests and connects to any address that Baton names.
	QuietOriginalDst = "quiet-original-dst"
	// FullDuplexOverrideHost passes response bodies through Baton too.
	FullDuplexOverrideHost = "full-duplex-override-host"
	// BufferedOverrideHost buffers request bodies, as gateways do that cannot stream them.
	BufferedOverrideHost = "buffered-override-host"
)

//go:embed envoy.yaml.tmpl
var source string

// Values are the placeholders of the template.
type Values struct {
	ListenPort int              // for clients, on loopback
	AdminPort  int              // Envoy's admin interface, on loopback
	EPPPort    int              // Baton's --grpc-port, on loopback
	EPPTLS     bool             // whether Baton serves TLS there (--secure-serving, its default)
	Endpoints  []netip.AddrPort // the model servers; not used by QuietOriginalDst, required otherwise

	// MessageTimeout is ext_proc's message_timeout; 0 means 5s. Full-duplex requests are not timed by it.
	MessageTimeout time.Duration
}

// Defaults are the values in the shipped files: Baton's own port, and two model servers on vLLM's.
func Defaults() Values {
	return Values{
		ListenPort: 8081,
		AdminPort:  19000,
		EPPPort:    9002,
		Endpoints: []netip.AddrPort{
			netip.MustParseAddrPort("127.0.0.1:8000"),
			netip.MustParseAddrPort("127.0.0.1:8001"),
		},
	}
}

// ControlHeaders are the request headers that only Baton may set; the shipped configurations remove what a client sends.
// x-baton-depth is not among them: by it Baton refuses a sub-request of its own that comes back through the gateway. It
// can only make a request be refused, and Baton removes it from what goes to the model server.
func ControlHeaders() []string {
	return []string{
		"x-gateway-destination-endpoint",
		"x-gateway-destination-endpoint-served",
		"x-prefiller-host-port",
		"x-encoder-hosts-ports",
		"x-kv-cache-source-host-port",
		"x-data-parallel-host-port",
		"x-processor-attempt",
	}
}

// A variant is what one shipped configuration has of its own.
type variant struct {
	Name               string
	Summary            string // first line of the file
	OriginalDst        bool   // routing: the ORIGINAL_DST cluster instead of override_host
	Buffered           bool   // request bodies: BUFFERED instead of FULL_DUPLEX_STREAMED
	FullDuplexResponse bool   // response bodies: FULL_DUPLEX_STREAMED instead of NONE
}

func variants() []variant {
	return []variant{
		{
			Name:    QuietOverrideHost,
			Summary: "Envoy with Baton: streamed requests, quiet responses, routing among known endpoints. Start from this one.",
		},
		{
			Name:        QuietOriginalDst,
			Summary:     "Envoy with Baton: streamed requests, quiet responses, endpoints that Envoy need not know (ORIGINAL_DST).",
			OriginalDst: true,
		},
		{
			Name:               FullDuplexOverrideHost,
			Summary:            "Envoy with Baton: requests and responses both streamed through Baton, routing among known endpoints.",
			FullDuplexResponse: true,
		},
		{
			Name:     BufferedOverrideHost,
			Summary:  "Envoy with Baton: buffered requests, quiet responses, routing among known endpoints.",
			Buffered: true,
		},
	}
}

// Names returns the names that [Render] knows.
func Names() []string {
	all := variants()
	names := make([]string, 0, len(all))
	for _, v := range all {
		names = append(names, v.Name)
	}
	return names
}

// Render returns the configuration called name, one of [Names], filled in with v.
func Render(name string, v Values) ([]byte, error) {
	all := variants()
	i := slices.IndexFunc(all, func(w variant) bool { return w.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("envoy configuration %q: there are %s", name, strings.Join(Names(), ", "))
	}
	if len(v.Endpoints) == 0 && !all[i].OriginalDst {
		return nil, fmt.Errorf("envoy configuration %s: no endpoints", name)
	}
	if v.MessageTimeout == 0 {
		v.MessageTimeout = 5 * time.Second
	}
	data := struct {
		Values
		variant
		ControlHeaders []string
		MessageTimeout string // in seconds, as Envoy reads it
	}{v, all[i], ControlHeaders(), strconv.FormatFloat(v.MessageTimeout.Seconds(), 'f', -1, 64) + "s"}

	t, err := template.New(name).Option("missingkey=error").Parse(source)
	if err != nil {
		return nil, fmt.Errorf("envoy configuration template: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, data); err != nil {
		return nil, fmt.Errorf("envoy configuration %s: %w", name, err)
	}
	return out.Bytes(), nil
}
