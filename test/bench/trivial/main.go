// trivial does nothing: it is what any Go program costs to start and to end.
package main

func main() {}
