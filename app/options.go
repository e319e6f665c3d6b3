// SPDX-License-Identifier: Apache-2.0

package app

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/baton-epp/baton/scheduler"
)

// Options are what the command line sets. Names and defaults follow llm-d's flags where they mean the same.
type Options struct {
	ConfigFile, ConfigText string // at most one; neither means the default profile
	EndpointsFile          string // endpoints to watch, in file-discovery's format; in place of dataLayer.discovery

	BindAddress string // host part of every TCP listener; empty = all interfaces
	GRPCPort    int    // ext_proc, 9002; 0 = a free port
	GRPCSocket  string // a Unix socket for ext_proc beside or (with GRPCPort -1) instead of TCP
	HealthPort  int    // gRPC health, 9003; 0 = a free port, -1 = none
	MetricsPort int    // Prometheus and /debug, 9090; 0 = a free port, -1 = none

	SecureServing   bool   // TLS on the ext_proc port; a self-signed certificate unless CertPath is set
	CertPath        string // folder with tls.crt and tls.key
	CertReload      bool   // read CertPath again when its content changes
	TLSMinVersion   string // VersionTLS12 or VersionTLS13; empty = 1.2
	TLSCipherSuites []string
	MetricsCertDir  string // TLS on the metrics port, with tls.crt and tls.key of this folder
	MetricsAuth     *bool  // nil = on with a Kubernetes source only
	EnableDebug     bool   // /debug/decisions and /debug/endpoints on the metrics port
	EnablePprof     bool
	MetricsNames    string // llm-d (default) or gie

	RefreshMetricsInterval time.Duration // lower bound of the adaptive scrape interval, 50 ms
	MetricsStaleness       time.Duration // --metrics-staleness-threshold, 2 s
	DrainTimeout           time.Duration // after SIGTERM, 30 s
	DrainDelay             time.Duration // NOT_SERVING before GOAWAY, 5 s (docs/design.md 5.3)
	MaxRecvMsgSize         int           // bytes, 0 = fits limits.maxBodyBytes
	MaxSendMsgSize         int           // bytes, 0 = fits limits.maxBodyBytes
	DisableSubsetFilter    bool
	PoolName               string // label name of the pool gauges

	// Plugins are scheduling plugins beside Baton's own, by type, for programs that bring theirs.
	Plugins scheduler.Registry

	Tracing bool // spans by OTLP; off unless OTEL_ variables are set
	Version string
	Logger  *slog.Logger
}

// DefaultOptions are the defaults of the flags.
func DefaultOptions() Options {
	return Options{
		GRPCPort: 9002, HealthPort: 9003, MetricsPort: 9090, SecureServing: true, MetricsNames: "llm-d",
		RefreshMetricsInterval: 50 * time.Millisecond, MetricsStaleness: 2 * time.Second,
		DrainTimeout: 30 * time.Second, DrainDelay: 5 * time.Second,
		Version: "dev", Logger: slog.New(slog.DiscardHandler),
	}
}

// minRefresh is llm-d's floor of --refresh-metrics-interval; smaller values are raised to it there, refused here.
const minRefresh = time.Millisecond

// validate collects every problem.
func (o *Options) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.ConfigFile != "" && o.ConfigText != "" {
		fail("--config-file and --config-text: set one, not both")
	}
	if o.BindAddress != "" {
		if _, err := netip.ParseAddr(o.BindAddress); err != nil {
			fail("--bind-address: %q is not an IP address", o.BindAddress)
		}
	}
	for flag, port := range map[string]int{"--grpc-port": o.GRPCPort, "--grpc-health-port": o.HealthPort, "--metrics-port": o.MetricsPort} {
		if port < -1 || port > 65535 {
			fail("%s: %d, must be 0 to 65535 (or -1 for none)", flag, port)
		}
	}
	if o.GRPCPort == -1 && o.GRPCSocket == "" {
		fail("--grpc-port -1 needs --grpc-socket")
	}
	if o.RefreshMetricsInterval < minRefresh {
		fail("--refresh-metrics-interval: %v, must be at least %v", o.RefreshMetricsInterval, minRefresh)
	}
	if o.MetricsStaleness <= 0 {
		fail("--metrics-staleness-threshold: %v, must be above 0", o.MetricsStaleness)
	}
	if o.DrainTimeout < 0 || o.DrainDelay < 0 {
		fail("--drain-timeout: %v, must not be negative", o.DrainTimeout)
	}
	if o.MetricsNames != "llm-d" && o.MetricsNames != "gie" {
		fail("--metrics-names: %q, must be llm-d or gie", o.MetricsNames)
	}
	if o.MetricsAuth != nil && *o.MetricsAuth {
		fail("--metrics-endpoint-auth: needs the Kubernetes source (TokenReview), which is not built yet; leave it unset")
	}
	if o.Logger == nil {
		fail("Options.Logger is missing")
	}
	return errors.Join(errs...)
}

// readConfig returns the configuration text and the name to call it in errors; empty text means defaults.
func (o *Options) readConfig() (name string, text []byte, err error) {
	switch {
	case o.ConfigText != "":
		return "--config-text", []byte(o.ConfigText), nil
	case o.ConfigFile != "":
		text, err = os.ReadFile(o.ConfigFile)
		if err != nil {
			return "", nil, fmt.Errorf("--config-file: %w", err)
		}
		return o.ConfigFile, text, nil
	default:
		return "", nil, nil
	}
}
