// Package kubernetes holds the manifests of conflist/kubernetes against the API of
// Kubernetes: its own types, defaults and validation, and kustomize. It is a module
// of its own, since nothing else needs these.
package kubernetes
